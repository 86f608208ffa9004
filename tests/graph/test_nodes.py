import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F

from qimera.graph.folding import fold_batch_norms, unfold_batch_norms
from qimera.graph.nodes import BATCH_NORM, WEIGHTED, aten, layer_name, logits_node, with_outputs
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import NETWORKS, SPEC, Head, calibrated, random_network


def images(count: int = 4) -> Tensor:
    return torch.randn(count, *SPEC.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Teacher]:
    return request.param, random_network(request.param), shared.teacher_of(request.param)


def norms(module: GraphModule) -> int:
    return len(module.graph.find_nodes(op="call_function", target=BATCH_NORM))


def assert_same_logits(module: nn.Module, teacher: Teacher) -> None:
    with torch.no_grad():
        for count in (1, 4):
            expected, actual = teacher(images(count)), module(images(count))
            # rounding of folded weights: 1e-4 of the largest logit
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


class Values(Interpreter):
    """Keeps what every node returns."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.kept: dict[str, object] = {}

    def run_node(self, n: Node) -> object:
        self.kept[n.name] = super().run_node(n)
        return self.kept[n.name]


def test_every_node_knows_what_it_returns(network: tuple[str, nn.Module, Teacher]) -> None:
    """For 13 images, the batch that stands for all others."""
    _, _, teacher = network
    run = Values(teacher.module)
    with torch.no_grad():
        run.run(images(13))
    for node in teacher.module.graph.nodes:
        known, value = node.meta["val"], run.kept[node.name]
        if isinstance(value, Tensor):
            assert known.dtype == value.dtype, node
            assert [each if isinstance(each, int) else each.node.hint for each in known.shape] == list(value.shape), (
                node
            )


# --- folding ----------------------------------------------------------------------------------------------------------

NOT_FOLDED = {"norms before convolutions": 3, "convolution read twice": 1}
"""Batch norms that no layer can take in: their input is an addition, or is read by others too."""


def test_the_folded_graph_gives_the_teachers_logits(network: tuple[str, nn.Module, Teacher]) -> None:
    name, _, teacher = network
    folded = fold_batch_norms(teacher.module)
    assert norms(teacher.module) > NOT_FOLDED.get(name, 0) or name in ("convolution read twice", "transformer")
    assert norms(folded) == NOT_FOLDED.get(name, 0)
    assert_same_logits(folded, teacher)


def test_the_unfolded_graph_gives_the_teachers_logits_without_a_batch_norm(
    network: tuple[str, nn.Module, Teacher],
) -> None:
    _, _, teacher = network
    unfolded = unfold_batch_norms(teacher.module)
    assert norms(unfolded) == 0
    assert_same_logits(unfolded, teacher)


def test_the_captured_graph_gives_the_models_logits(network: tuple[str, nn.Module, Teacher]) -> None:
    _, model, teacher = network
    with torch.no_grad():
        # rounding in another memory layout
        torch.testing.assert_close(teacher(images()), model(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", [fold_batch_norms, unfold_batch_norms])
def test_the_graph_itself_is_left_alone(network: tuple[str, nn.Module, Teacher], transform) -> None:  # type: ignore[no-untyped-def]
    _, _, teacher = network
    code = teacher.module.code
    state = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    changed = transform(teacher.module)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(1)
    assert teacher.module.code == code
    after = teacher.module.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_calls_that_share_a_convolution_get_weights_of_their_own_when_folded() -> None:
    teacher = shared.teacher_of("shared convolution")
    folded = fold_batch_norms(teacher.module)
    weights = [node.args[1].target for node in folded.graph.nodes if node.target in WEIGHTED]
    assert len(set(weights)) == len(weights) == 5
    layers = [layer_name(node) for node in folded.graph.nodes if node.target in WEIGHTED]
    assert layers == ["stem", "conv", "conv", "conv", "head.fc"]


class Numbered(nn.Module):
    """Calls one weight twice, and has another whose name is that of a copy of the first."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3, generator=rng))
        self.weight_2 = nn.Parameter(torch.randn(8, 3, 3, 3, generator=rng))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.weight, self.weight, self.weight_2)
        parts = [norm(F.conv2d(x, each, padding=1)) for norm, each in zip(self.norms, weights, strict=True)]
        return F.relu(parts[0] + 2 * parts[1] + 3 * parts[2])


def test_a_copy_of_a_weight_takes_the_name_of_no_other() -> None:
    teacher = Teacher.capture(calibrated(nn.Sequential(Numbered(), Head(8))), SPEC)
    assert_same_logits(fold_batch_norms(teacher.module), teacher)


def test_a_folded_norm_leaves_its_name_to_the_layer() -> None:
    """Block outputs are matched by name between the teacher's graph and the student's."""
    teacher = shared.teacher_of("residual")
    before = [node.name for node in teacher.module.graph.nodes if node.target is BATCH_NORM]
    folded = fold_batch_norms(teacher.module)
    after = [node.name for node in folded.graph.nodes if node.target is aten.conv2d.default]
    unfolded = unfold_batch_norms(teacher.module)
    sums = [node.name for node in unfolded.graph.nodes if node.name in after]
    assert len(after) == len(before) == len(sums)


def test_unfolded_norms_can_be_trained() -> None:
    unfolded = unfold_batch_norms(shared.teacher_of("residual").module)
    names = [name for name, _ in unfolded.named_parameters()]
    assert "bn1.factor" in names
    assert "bn1.offset" in names


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_extra_outputs_are_the_tensors_of_the_named_nodes(teacher: Teacher) -> None:
    norm = next(node for node in teacher.module.graph.nodes if node.target is BATCH_NORM)
    graph = with_outputs(teacher.module, [norm.args[0].name, norm.name])
    with torch.no_grad():
        logits, (entering, leaving) = graph(images())
        assert torch.equal(logits, teacher(images()))
    bn = teacher.module.get_submodule("bn1")
    expected = nn.functional.batch_norm(entering, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    torch.testing.assert_close(leaving, expected)


def test_extra_outputs_share_the_parameters(teacher: Teacher) -> None:
    graph = with_outputs(teacher.module, [])
    own = dict(teacher.module.named_parameters())
    assert all(each is own[name] for name, each in graph.named_parameters())
    with torch.no_grad():
        assert graph(images())[1] == []


def test_the_logits_node_is_found_behind_a_tuple(teacher: Teacher) -> None:
    assert logits_node(with_outputs(teacher.module, [])).name == logits_node(teacher.module).name


def test_layers_are_called_as_in_the_users_model(teacher: Teacher) -> None:
    names = [layer_name(node) for node in teacher.module.graph.nodes if node.target in WEIGHTED]
    assert names == ["conv1", "conv2", "conv3", "depthwise", "pointwise", "fc"]
