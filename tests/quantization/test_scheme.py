import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from qimera.config.bits import parse_layer_bits
from qimera.config.settings import QuantizationSettings
from qimera.graph.nodes import CONVOLUTIONS, MATRIX_PRODUCTS, WEIGHTED, aten, layer_name
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize, MinMaxFakeQuantize
from qimera.quantization.scheme import ADDITIONS, JOINS, POOLINGS, RELUS, before_moves, is_move
from qimera.student.student import Student
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import NETWORKS, SPEC, Head, random_network


def student_of(teacher: Teacher, layer_bits: str = "", **settings: object) -> Student:
    return Student(teacher, QuantizationSettings(layer_bits=parse_layer_bits(layer_bits), **settings))


def quantizer_at(student: Student, node: object) -> LearnedStepFakeQuantize | MinMaxFakeQuantize | None:
    """Return the quantizer that ``node`` calls, if it calls one."""
    if not isinstance(node, Node) or node.op != "call_module":
        return None
    module = student.module.get_submodule(str(node.target))
    assert isinstance(module, LearnedStepFakeQuantize | MinMaxFakeQuantize)
    return module


def bits_of(quantizer: LearnedStepFakeQuantize | MinMaxFakeQuantize | None) -> int | None:
    return None if quantizer is None else (quantizer.quant_max - quantizer.quant_min).bit_length()


def bits_before(student: Student, node: Node, index: int) -> int | None:
    """Return the width of the grid on which ``node`` reads its argument; None for full precision."""
    return bits_of(quantizer_at(student, before_moves(node.args[index])))


def layers(student: Student) -> dict[str, Node]:
    return {layer_name_of(student, node): node for node in student.module.graph.nodes if node.target in WEIGHTED}


def layer_name_of(student: Student, node: Node) -> str:
    """Return the name of a layer, whose weight now stands behind a quantizer."""
    weight = node.args[1]
    assert isinstance(weight, Node)
    return str(weight.args[0].target).rpartition(".")[0] if weight.op == "call_module" else layer_name(node)


def reads_images(node: Node) -> bool:
    """Whether ``node`` is the network's input, or that moved about or quantized."""
    while node.op == "call_module" or is_move(node):
        node = node.args[0]
    return node.op == "placeholder"


@pytest.fixture(scope="module", params=NETWORKS)
def random_teacher(request: pytest.FixtureRequest) -> Teacher:
    return shared.teacher_of(request.param)


# --- hardware ---------------------------------------------------------------------------------------------------------


def test_every_edge_that_an_integer_kernel_reads_is_on_a_grid(random_teacher: Teacher) -> None:
    student = student_of(random_teacher, weight_bits=3, activation_bits=5, edge_bits=7, input_bits=6)
    found = 0
    for node in student.module.graph.nodes:
        if node.target in WEIGHTED:
            assert bits_before(student, node, 0) == (6 if reads_images(node.args[0]) else 5), node
            assert bits_before(student, node, 1) == 3, node
            found += 1
        elif node.target in MATRIX_PRODUCTS:
            assert [bits_before(student, node, index) for index in (0, 1)] == [5, 5], node
        elif node.target in POOLINGS:
            assert bits_before(student, node, 0) == 7, node
        elif node.target is aten.cat.default:
            grids = [bits_of(quantizer_at(student, before_moves(each))) for each in node.args[0]]
            assert grids == [7] * len(node.args[0]), node
        elif node.target in JOINS and all(isinstance(each, Node) and each.op != "get_attr" for each in node.args[:2]):
            assert [bits_before(student, node, index) for index in (0, 1)] == [7, 7], node
    assert found == len(random_teacher.layers)


def test_the_networks_above_have_every_kind_of_edge() -> None:
    targets = {node.target for name in NETWORKS for node in shared.teacher_of(name).module.graph.nodes}
    assert {aten.add.Tensor, aten.mul.Tensor, aten.cat.default, aten.matmul.default} <= targets
    assert {
        aten.max_pool2d.default,
        aten.avg_pool2d.default,
        aten.mean.dim,
        aten.adaptive_avg_pool2d.default,
    } <= targets
    assert {aten.conv2d.default, aten.conv_transpose2d.input, aten.linear.default} <= targets


def test_weights_are_symmetric_per_output_channel(random_teacher: Teacher) -> None:
    student = student_of(random_teacher)
    for node in layers(student).values():
        quantizer = quantizer_at(student, node.args[1])
        assert isinstance(quantizer, LearnedStepFakeQuantize)
        assert (quantizer.quant_min, quantizer.quant_max, quantizer.dtype) == (-8, 7, torch.int8)
        transposed = node.target is aten.conv_transpose2d.input
        weight = student.module.get_parameter(str(node.args[1].args[0].target))
        axis = 1 if transposed else 0
        assert quantizer.scale.numel() == weight.shape[axis] == quantizer.scale.shape[axis]
        assert not quantizer.zero_point.any()


def test_activations_are_unsigned_with_one_step_each(random_teacher: Teacher) -> None:
    student = student_of(random_teacher)
    for node in layers(student).values():
        quantizer = quantizer_at(student, before_moves(node.args[0]))
        assert isinstance(quantizer, LearnedStepFakeQuantize)
        assert quantizer.quant_min == 0
        assert quantizer.dtype == torch.uint8
        assert quantizer.scale.ndim == 0


def test_a_tensor_read_at_two_widths_goes_through_the_wider_grid_first(teacher: Teacher) -> None:
    """The first ReLU is read by a convolution at 4 bits and by an addition at 8."""
    student = student_of(teacher)
    (addition,) = [node for node in student.module.graph.nodes if node.target is aten.add.Tensor]
    narrow, wide = layers(student)["conv2"].args[0], addition.args[0]
    assert bits_of(quantizer_at(student, narrow)) == 4
    assert bits_of(quantizer_at(student, wide)) == 8
    assert narrow.args[0] is wide
    assert wide.args[0].target in RELUS


def test_a_tensor_read_at_one_width_is_quantized_once(teacher: Teacher) -> None:
    student = student_of(teacher, activation_bits=8)
    (addition,) = [node for node in student.module.graph.nodes if node.target is aten.add.Tensor]
    shared = layers(student)["conv2"].args[0]
    assert quantizer_at(student, shared) is quantizer_at(student, addition.args[0])
    assert shared.args[0].target in RELUS


def test_nothing_is_quantized_between_a_layer_and_its_activation_function(teacher: Teacher) -> None:
    student = student_of(teacher)
    relus = [node for node in student.module.graph.nodes if node.target in RELUS]
    assert len(relus) == 5
    assert all(node.args[0].op == "call_function" for node in relus)


def test_the_input_has_its_own_width_also_behind_padding() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Head(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.bn(self.conv(F.pad(x, [1, 2, 1, 2])))))

    student = student_of(Teacher.capture(Padded(), SPEC), weight_bits=2, activation_bits=2)
    assert bits_before(student, layers(student)["conv"], 0) == 8
    assert bits_before(student, layers(student)["head.fc"], 0) == 2


def test_a_bias_lies_on_the_grid_of_its_layers_sums(random_teacher: Teacher) -> None:
    student = student_of(random_teacher)
    student.initialize_ranges_([torch.randn(8, *SPEC.shape, generator=torch.Generator().manual_seed(0))])
    with_bias = [node for node in layers(student).values() if len(node.args) > 2 and node.args[2] is not None]
    assert with_bias
    for node in with_bias:
        bias_quantizer = student.module.get_submodule(str(node.args[2].target))
        bias = student.module.get_parameter(str(node.args[2].args[0].target))
        activation = quantizer_at(student, before_moves(node.args[0]))
        weight = quantizer_at(student, node.args[1])
        step = (activation.scale * weight.scale.flatten()).repeat(len(bias) // weight.scale.numel())
        rounded = bias_quantizer(bias)
        levels = rounded / step
        # float32 holds 24 bits; a bias may take a million steps here
        torch.testing.assert_close(
            levels, levels.round(), atol=1e-7 * float(levels.abs().max().detach()) + 1e-4, rtol=0
        )
        assert bool(((rounded - bias).abs() <= 0.5001 * step).all())


def test_a_bias_of_a_dead_channel_keeps_its_value() -> None:
    """A channel whose weights are next to nothing gets a step that is large enough to count the bias in."""
    model = random_network("convolution without bias")
    with torch.no_grad():
        model.bn.weight[2:4] = torch.tensor([0.0, 1e-30])
        model.bn.bias[2:4] = torch.tensor([3.0, -2.0])
    images = torch.randn(8, *SPEC.shape, generator=torch.Generator().manual_seed(0))
    student = student_of(Teacher.capture(model, SPEC))
    student.initialize_ranges_([images])
    student.train()(images).square().sum().backward()
    node = layers(student)["conv"]
    bias = student.module.get_parameter(str(node.args[2].args[0].target))
    rounded = student.module.get_submodule(str(node.args[2].target))(bias)
    assert rounded[2:4].tolist() == pytest.approx(bias[2:4].tolist(), rel=1e-3)
    assert all(bool(each.grad.isfinite().all()) for each in student.parameters() if each.grad is not None)


@pytest.mark.parametrize("activation", [nn.Hardswish(), nn.SiLU(), nn.Sigmoid()])
def test_what_an_integer_kernel_cannot_finish_is_rounded_where_the_layer_ends(activation: nn.Module) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.activation, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation, Head(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.activation(self.bn(self.conv(x))))

    student = student_of(Teacher.capture(Net(), SPEC), edge_bits=7)
    (user,) = layers(student)["conv"].users
    assert bits_of(quantizer_at(student, user)) == 7
    (user,) = layers(student)["head.fc"].users
    assert user.op == "output"


def test_values_are_rounded_before_they_are_moved_about(teacher: Teacher) -> None:
    """So that integers are moved: here flattened on their way into the classifier."""
    student = student_of(teacher)
    entering = layers(student)["fc"].args[0]
    assert entering.target is aten.flatten.using_ints
    assert bits_of(quantizer_at(student, entering.args[0])) == 4


# --- exceptions by layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("", {"conv1": (4, 8), "conv2": (4, 4), "depthwise": (4, 4), "fc": (4, 4)}),
        ("conv2=8", {"conv1": (4, 8), "conv2": (8, 8), "conv3": (4, 4), "fc": (4, 4)}),
        ("fc=w3a5", {"conv2": (4, 4), "fc": (3, 5)}),
        ("conv?=w2a6,depthwise=8", {"conv1": (2, 8), "conv2": (2, 6), "conv3": (2, 6), "depthwise": (8, 8)}),
        ("*=3,fc=8", {"conv1": (3, 8), "conv3": (3, 3), "pointwise": (3, 3), "fc": (8, 8)}),
    ],
)
def test_layers_named_by_a_pattern_get_bits_of_their_own(
    teacher: Teacher, rules: str, expected: dict[str, tuple[int, int]]
) -> None:
    student = student_of(teacher, rules)
    nodes = layers(student)
    found = {name: (bits_before(student, nodes[name], 1), bits_before(student, nodes[name], 0)) for name in expected}
    assert found == expected


def test_three_widths_of_one_tensor_start_from_the_widest(teacher: Teacher) -> None:
    student = student_of(teacher, "conv2=w4a3", edge_bits=6)
    narrow = layers(student)["conv2"].args[0]
    assert bits_of(quantizer_at(student, narrow)) == 3
    assert bits_of(quantizer_at(student, narrow.args[0])) == 6


# --- paper ------------------------------------------------------------------------------------------------------------


def test_the_paper_quantizes_activations_after_relus_alone(random_teacher: Teacher) -> None:
    student = student_of(random_teacher, scheme="paper", weight_bits=3, activation_bits=5)
    activations = [
        node
        for node in student.module.graph.nodes
        if node.op == "call_module" and not (isinstance(node.args[0], Node) and node.args[0].op == "get_attr")
    ]
    assert all(node.args[0].target in RELUS for node in activations)
    assert [bits_of(quantizer_at(student, node)) for node in activations] == [5] * len(activations)
    relus = [node for node in student.module.graph.nodes if node.target in RELUS]
    assert len(relus) == len(activations)
    assert relus or aten.gelu.default in {node.target for node in student.module.graph.nodes}
    assert all(isinstance(quantizer_at(student, node), MinMaxFakeQuantize) for node in activations)


def test_the_paper_quantizes_every_weight_by_its_own_extremes(random_teacher: Teacher) -> None:
    student = student_of(random_teacher, scheme="paper", weight_bits=3)
    for node in layers(student).values():
        quantizer = quantizer_at(student, node.args[1])
        assert isinstance(quantizer, MinMaxFakeQuantize)
        assert quantizer.per_call
        assert bits_of(quantizer) == 3
        assert not quantizer.symmetric


def test_the_paper_keeps_the_input_and_the_pooled_features_in_full_precision(teacher: Teacher) -> None:
    student = student_of(teacher, scheme="paper")
    nodes = layers(student)
    assert bits_before(student, nodes["conv1"], 0) is None
    assert bits_before(student, nodes["fc"], 0) is None
    assert bits_before(student, nodes["conv2"], 0) == 4


def test_the_paper_leaves_batch_norms_unfolded_and_trainable(teacher: Teacher) -> None:
    names = [name for name, each in student_of(teacher, scheme="paper").module.named_parameters() if each.requires_grad]
    assert {"bn1.factor", "bn1.offset", "bn5.factor", "bn5.offset"} <= set(names)


def test_layers_named_by_a_pattern_get_weight_bits_of_their_own_in_the_paper_scheme(teacher: Teacher) -> None:
    student = student_of(teacher, "conv2=8", scheme="paper")
    nodes = layers(student)
    assert bits_before(student, nodes["conv2"], 1) == 8
    assert bits_before(student, nodes["conv3"], 1) == 4


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "inductor", "xnnpack"])
def test_some_targets_add_before_they_round(target: str) -> None:
    student = student_of(shared.teacher_of("residual"), target=target)
    convolutions = [node for node in student.module.graph.nodes if node.target in CONVOLUTIONS]
    added = [node for node in convolutions if any(user.target in ADDITIONS for user in node.users)]
    rounded = [node for node in convolutions if any(user.op == "call_module" for user in node.users)]
    if target in ("openvino", "inductor"):
        assert added
        assert not set(added) & set(rounded)
    else:
        assert not added


class BareWeight(nn.Module):
    """A weight that lies in the network itself and that two convolutions read; another is called nearly the same."""

    def __init__(self, *, standardized: bool) -> None:
        super().__init__()
        self.w, self.w_1 = (nn.Parameter(torch.randn(3, 3, 3, 3)) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
        self.standardized = standardized
        self.head = Head(3)

    def forward(self, x: Tensor) -> Tensor:
        w = self.w - self.w.mean((1, 2, 3), keepdim=True) if self.standardized else self.w
        x = F.conv2d(x, self.w_1).relu()
        for norm in self.norms:
            x = norm(F.conv2d(x, w)).relu()
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("scheme", ["hardware", "paper"])
def test_bits_of_a_weight_in_the_network_itself_reach_each_of_its_calls(scheme: str, standardized: bool) -> None:
    teacher = Teacher.capture(BareWeight(standardized=standardized).eval(), SPEC)
    name = "w_weight" if standardized else "w"
    assert [layer.name for layer in teacher.layers] == ["w_1", name, name, "head.fc"]
    student = student_of(teacher, f"{name}=w8a4", scheme=scheme)
    nodes = {each.name: each for each in student.module.graph.nodes}
    found = {layer: bits_before(student, nodes[node], 1) for node, layer in student.layer_names().items()}
    assert found == {"w_1": 4, name: 8, f"{name}@1": 8, "head.fc": 4}
