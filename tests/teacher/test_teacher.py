import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.config.input_spec import InputSpec
from qimera.errors import ConfigError, UnsupportedModelError
from qimera.teacher.teacher import Teacher
from tests import shared
from tests.networks import NUM_CLASSES, SPEC, Lambda, TinyNet, behind_stem, random_network


def images(count: int = 4) -> Tensor:
    return torch.randn(count, *SPEC.shape, generator=torch.Generator().manual_seed(0))


# --- what it knows ----------------------------------------------------------------------------------------------------


def test_the_teacher_answers_as_the_model_for_any_batch_size(tiny_model: TinyNet, teacher: Teacher) -> None:
    with torch.no_grad():
        for count in (1, 2, 5):
            # rounding in another memory layout
            torch.testing.assert_close(teacher(images(count)), tiny_model(images(count)), rtol=1e-4, atol=1e-5)


def test_every_batch_norm_is_tapped_with_what_it_recorded(tiny_model: TinyNet, teacher: Teacher) -> None:
    assert [tap.name for tap in teacher.batch_norms] == ["bn1", "bn2", "bn3", "bn4", "bn5"]
    for tap in teacher.batch_norms:
        norm = tiny_model.get_submodule(tap.name)
        assert torch.equal(tap.mean, norm.running_mean)
        assert torch.equal(tap.var, norm.running_var)


def test_taps_see_what_enters_each_batch_norm(tiny_model: TinyNet, teacher: Teacher) -> None:
    seen: dict[str, Tensor] = {}
    model = copy.deepcopy(tiny_model)
    for tap in teacher.batch_norms:
        model.get_submodule(tap.name).register_forward_pre_hook(
            lambda module, args, name=tap.name: seen.update({name: args[0]})
        )
    with torch.no_grad():
        model(images())
        logits, (entering, *_) = teacher.forward_with_taps(images())
        assert torch.equal(logits, teacher(images()))
    for tap, x in zip(teacher.batch_norms, entering, strict=True):
        torch.testing.assert_close(x, seen[tap.name], rtol=1e-4, atol=1e-4)  # rounding in another memory layout


def test_layers_are_listed_with_their_work(teacher: Teacher) -> None:
    layers = {layer.name: layer for layer in teacher.layers}
    assert list(layers) == ["conv1", "conv2", "conv3", "depthwise", "pointwise", "fc"]
    assert layers["conv1"].macs == 16 * 16 * 8 * 3 * 3 * 3
    assert layers["depthwise"].macs == 8 * 8 * 8 * 3 * 3
    assert layers["pointwise"].macs == 8 * 8 * 24 * 8
    assert layers["fc"].macs == 24 * NUM_CLASSES
    assert layers["fc"].kind == "linear"
    assert layers["conv1"].kind == "conv2d"


def test_an_uncommon_batch_norm_is_recognised() -> None:
    class NormAndActivation(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(super().forward(x))

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), NormAndActivation(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    assert [tap.name for tap in Teacher.capture(model, SPEC).batch_norms] == ["1"]


# --- the user's model stays as it is ----------------------------------------------------------------------------------


def test_capturing_changes_nothing_about_the_model() -> None:
    model = TinyNet().train()
    model.conv2.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    flags = [each.requires_grad for each in model.parameters()]
    teacher = Teacher.capture(model, SPEC)
    assert [each.requires_grad for each in model.parameters()] == flags
    assert all(module.training for module in model.modules())
    assert all(each.grad is None for each in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(not each.requires_grad for each in teacher.parameters())
    shared = {each.data_ptr() for each in model.parameters()} & {each.data_ptr() for each in teacher.parameters()}
    assert not shared


def test_a_model_in_training_mode_is_captured_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(784, 3)).train()
    teacher = Teacher.capture(model, SPEC)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images()), model.eval()(images()), rtol=1e-4, atol=1e-5)  # memory layout


def test_gradients_pass_through_the_teacher_to_the_images_alone(teacher: Teacher) -> None:
    leaf = images().requires_grad_()
    logits, (entering, *_) = teacher.forward_with_taps(leaf)
    (logits.sum() + sum(x.square().sum() for x in entering)).backward()
    assert leaf.grad is not None
    assert bool(leaf.grad.any())
    assert all(each.grad is None for each in teacher.parameters())


# --- hash and file ----------------------------------------------------------------------------------------------------


def test_the_hash_depends_on_weights_statistics_and_graph(tiny_model: TinyNet, teacher: Teacher) -> None:
    assert Teacher.capture(copy.deepcopy(tiny_model), SPEC).hash == teacher.hash
    for name in ("conv1.weight", "fc.bias", "bn3.running_var"):
        changed = copy.deepcopy(tiny_model)
        with torch.no_grad():
            changed.state_dict()[name].view(-1)[0] += 1e-3
        assert Teacher.capture(changed, SPEC).hash != teacher.hash, name


def test_the_hash_tells_networks_of_the_same_weights_apart(tiny_model: TinyNet, teacher: Teacher) -> None:
    others = [nn.LeakyReLU(0.2), nn.LeakyReLU(0.1), nn.SiLU()]
    hashes = {teacher.hash}
    for activation in others:
        model = copy.deepcopy(tiny_model)
        model.relu6 = activation  # type: ignore[assignment]
        hashes.add(Teacher.capture(model, SPEC).hash)
    assert len(hashes) == 4


def test_modes_change_nothing_about_a_teacher(tiny_model: TinyNet) -> None:
    teacher = Teacher.capture(tiny_model, SPEC)
    with torch.no_grad():
        expected = teacher(images())
        assert torch.equal(teacher.train()(images()), expected)
        assert torch.equal(teacher.eval().to("cpu")(images()), expected)


def test_a_teacher_moves_with_its_statistics(tiny_model: TinyNet) -> None:
    teacher = Teacher.capture(tiny_model, SPEC).to("meta")
    assert teacher.device.type == "meta"
    assert {tap.mean.device.type for tap in teacher.batch_norms} == {"meta"}
    assert teacher.forward_with_taps(images().to("meta"))[0].device.type == "meta"


def test_a_teacher_comes_back_as_it_was_saved(teacher: Teacher, tmp_path: Path) -> None:
    teacher.save(str(tmp_path / "teacher.safetensors"))
    loaded = Teacher.load(str(tmp_path / "teacher.safetensors"), SPEC)
    assert loaded.hash == teacher.hash
    assert [tap.name for tap in loaded.batch_norms] == [tap.name for tap in teacher.batch_norms]
    assert loaded.num_classes == teacher.num_classes
    with torch.no_grad():
        assert torch.equal(loaded(images(3)), teacher(images(3)))


@pytest.mark.parametrize("content", [b"", b"no program", b"PK\x03\x04"])
def test_a_file_that_holds_no_teacher_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "teacher.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"teacher\.safetensors: not a network saved by qimera, or damaged"):
        Teacher.load(tmp_path / "teacher.safetensors", SPEC)


# --- graphs that are written in unusual ways --------------------------------------------------------------------------


class Unusual(nn.Module):
    """A standardised weight, a masked one, writing in place, a branch for nothing, and a 1x1 convolution at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.unused = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.register_buffer("mask", (torch.rand(8, 8, 3, 3) > 0.5).float())
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv1.weight
        x = F.conv2d(x, (weight - weight.mean()) / weight.std())
        x = self.norm(x)
        F.relu(x, inplace=True)
        self.unused(x).relu_()
        x = F.conv2d(x, self.conv2.weight * self.mask, self.conv2.bias, padding=1)
        x += 1
        return self.head(F.adaptive_avg_pool2d(x, 1))


def test_what_depends_on_parameters_alone_becomes_a_parameter() -> None:
    torch.manual_seed(0)
    model = Unusual().eval()
    teacher = Teacher.capture(model, SPEC)
    assert [(layer.name, layer.kind) for layer in teacher.layers] == [
        ("conv1", "conv2d"),
        ("conv2", "conv2d"),
        ("head", "linear"),
    ]
    assert [tap.name for tap in teacher.batch_norms] == ["norm"]
    assert not any("_." in str(node.target) for node in teacher.module.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(teacher(images(3)), model(images(3)).flatten(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: (logits,),
        lambda logits: {"features": logits[:, :, None, None].expand(-1, -1, 4, 4), "logits": logits},
        lambda logits: logits[:, :, None, None],
        lambda logits: [{"logits": logits}, logits[:, :2]],
    ],
)
def test_the_logits_are_found_among_what_a_model_returns(wrap: Callable[[Tensor], object]) -> None:
    torch.manual_seed(0)
    model = Wrapped(wrap).eval()
    teacher = Teacher.capture(model, SPEC)
    torch.testing.assert_close(teacher(images(3)), model.network(images(3)), atol=1e-6, rtol=1e-5)
    assert teacher.classifier.name == "network.4"


def test_of_several_outputs_the_one_asked_for_is_taken() -> None:
    model = Wrapped(lambda logits: (logits, 2 * logits)).eval()
    first, second = (Teacher.capture(model, SPEC, key) for key in "01")
    torch.testing.assert_close(second(images(3)), 2 * first(images(3)))
    with pytest.raises(ConfigError, match=r"returns no logits of 2 images called 'head'; its outputs: 0 \(2, 3\), 1"):
        Teacher.capture(model, SPEC, "head")


@pytest.mark.parametrize(
    "wrap",
    [lambda logits: logits[:, :1], lambda logits: logits[:, 0], lambda logits: {"malignant": logits[:, :1].sigmoid()}],
)
def test_a_model_with_one_logit_is_refused_with_the_way_to_two(wrap: Callable[[Tensor], object]) -> None:
    with pytest.raises(UnsupportedModelError, match="let the last layer return minus and plus half of its one logit"):
        Teacher.capture(Wrapped(wrap).eval(), SPEC)


def test_the_two_logits_of_the_troubleshooting_page_say_what_the_sigmoid_of_one_said() -> None:
    page = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
    code = re.search(r"```python\n(.*?)```", page.partition("### let the last layer return")[2], re.DOTALL)
    assert code
    scope: dict[str, Any] = {}
    exec(code[1], scope)
    model = Wrapped(lambda logits: logits).eval()
    model.network[4] = single = nn.Linear(model.network[4].in_features, 1)
    expected = model(images(3)).sigmoid()
    model.network[4] = scope["with_two_outputs"](single)
    answers = Teacher.capture(model, SPEC)(images(3)).softmax(1)
    torch.testing.assert_close(answers[:, 1:], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda logits: logits, "output"),
        (lambda logits: {"head.main": logits, "other": 2 * logits}, "head.main"),
        (lambda logits: {"head": {"main": logits, "other": 2 * logits}}, "head.main"),
    ],
)
def test_an_output_is_chosen_by_the_name_that_messages_have_for_it(wrap: Callable[[Tensor], object], name: str) -> None:
    model = Wrapped(wrap).eval()
    teacher = Teacher.capture(model, SPEC, name)
    torch.testing.assert_close(teacher(images(3)), model.network(images(3)), atol=1e-6, rtol=1e-5)


# --- what samples are judged by ---------------------------------------------------------------------------------------


def test_layer_norms_and_attention_are_tapped() -> None:
    teacher = shared.teacher_of("transformer")
    with torch.no_grad():
        _, taps = teacher.forward_with_taps(images(3))
    assert taps.batch_norms == []
    assert [tuple(each.shape) for each in taps.layer_norms] == [(3, 17, 8)] * 3
    assert [tuple(each.shape) for each in taps.attentions] == [(3, 2, 17, 4)]
    assert [tuple(each.shape) for each in taps.scores] == [(3, 2, 17, 17)]


def test_attention_is_found_behind_a_mask_that_is_spread_over_the_batch() -> None:
    def attend(x: Tensor, bias: Tensor) -> Tensor:
        tokens = x.flatten(2)
        scores = tokens @ tokens.transpose(1, 2)
        masked = torch.where(bias.expand(x.shape[0], 8, 8) > 0, bias.expand(x.shape[0], 8, 8) + scores, -100.0)
        return (masked.softmax(-1) @ tokens).unflatten(2, x.shape[2:])

    teacher = Teacher.capture(behind_stem(Lambda(attend, torch.eye(8) + torch.ones(8, 8).tril(-1))), SPEC)
    with torch.no_grad():
        _, taps = teacher.forward_with_taps(images(3))
    assert [tuple(each.shape) for each in taps.scores] == [(3, 8, 8)]
    assert [tuple(each.shape) for each in taps.attentions] == [(3, 8, 256)]


def test_a_product_behind_a_softmax_of_something_else_is_no_attention() -> None:
    _, taps = shared.teacher_of("many edges").forward_with_taps(images(3))
    assert (taps.layer_norms, taps.attentions) == ([], [])


# --- refusals ---------------------------------------------------------------------------------------------------------


def network(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


class Wrapped(nn.Module):
    """A good network whose answer is wrapped by ``wrap``."""

    def __init__(self, wrap: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.network = network(nn.BatchNorm2d(4))
        self.wrap = wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.network(x))


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = network(nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) if x.sum() > 0 else self.network(-x)


UNSUPPORTED: dict[str, tuple[nn.Module, str]] = {
    "statistics of the batch": (
        network(nn.BatchNorm2d(4, track_running_stats=False)),
        "answers differently for an image when other images are in the batch",
    ),
    "two outputs": (Wrapped(lambda logits: (logits, logits)), "several tensors .* choose one of 0, 1 with --logits"),
    "a feature map": (Wrapped(lambda logits: logits[:, :, None, None].expand(-1, -1, 4, 4)), r"output \(2, 3, 4, 4\)"),
    "one class": (Wrapped(lambda logits: logits[:, :1]), r"output \(2, 1\).*at least 2 classes"),
    "a part of the classes": (Wrapped(lambda logits: logits[:, :2]), "one row for each of 2 classes"),
    "data-dependent flow": (DataDependent(), "DataDependent cannot be captured by torch.export.*control flow"),
}


@pytest.mark.parametrize("norm", [nn.ReLU(), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)], ids=lambda norm: str(norm))
def test_a_network_without_batch_norms_is_captured(norm: nn.Module) -> None:
    model = network(norm).eval()
    torch.testing.assert_close(Teacher.capture(model, SPEC)(images(3)), model(images(3)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_cannot_be_quantized_is_refused_with_the_reason(case: str) -> None:
    model, message = UNSUPPORTED[case]
    with pytest.raises(UnsupportedModelError, match=message) as refusal:
        Teacher.capture(model, SPEC)
    assert refusal.value.exit_code == 3
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("shape", [(1, 16, 16), (4, 16, 16)])
def test_images_that_the_model_cannot_process_are_refused(tiny_model: TinyNet, shape: tuple[int, int, int]) -> None:
    spec = InputSpec(shape=shape, mean=(0.0,) * shape[0], std=(1.0,) * shape[0])
    with pytest.raises(ConfigError, match=r"input_shape \(\d, 16, 16\): TinyNet cannot process such images"):
        Teacher.capture(tiny_model, spec)


def test_another_height_is_refused_where_the_model_flattens() -> None:
    spec = InputSpec(shape=(3, 24, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
    with pytest.raises(ConfigError, match=r"input_shape \(3, 24, 16\): LinearNorm cannot process"):
        Teacher.capture(random_network("linear layer with norm"), spec)
