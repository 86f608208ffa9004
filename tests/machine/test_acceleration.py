import json
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qimera.config.settings import DistillationSettings, QuantizationSettings
from qimera.machine.acceleration import (
    autocast,
    compiled,
    has_fast_bfloat16,
    is_compiled,
    narrow_gradients_,
    quick_gradients_,
)
from qimera.machine.modes import Precision
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher
from qimera.training.distillation import Lesson
from tests.forked import Starter, said_by

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)])
def steps(request: pytest.FixtureRequest, starter: Starter, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of compiled steps, with and without C++."""
    said = said_by(starter, tmp_path_factory.mktemp("steps"), "tests.compiled_step:main", [request.param])
    return dict(json.loads(said.splitlines()[-1]))


def test_a_compiled_step_is_one_graph_with_the_losses_and_gradients_of_the_plain_one(steps: dict[str, Any]) -> None:
    found = steps["student"]
    assert found["graphs"] == 2  # that of the teacher, and the losses
    assert found["breaks"] == []  # a step in parts is compiled anew every time, and slower than one that is not
    assert found["fused"] == pytest.approx(found["plain"], rel=1e-4)  # sums in another order
    # Another order of summation moves some value over the edge between two levels.
    assert max(found["distances"].values()) < 0.05


def test_every_resolution_of_a_compiled_generator_gets_its_gradient(steps: dict[str, Any]) -> None:
    distances = steps["image"]
    assert {"to_pixels.0.weight", "last_conv.weight", "linear.weight"} <= distances.keys()
    assert max(distances.values()) < 1e-4


def test_a_compiled_generator_learns_as_the_plain_one(steps: dict[str, Any]) -> None:
    found = steps["generator"]
    assert found["graphs"] == 2  # the batch is shifted between them
    assert found["breaks"] == []
    assert max(found["distances"].values()) < 1e-3  # the teacher's sums in another order
    assert len(found["distances"]) > 10
    assert found["losses"]["compiled"] == pytest.approx(found["losses"]["plain"], rel=0.02)
    assert found["losses"]["plain"][-1] < 0.7 * found["losses"]["plain"][0]  # shifted batches are noisier ones


def test_at_bfloat16_the_teacher_answers_nearly_the_same_and_the_student_the_very_same(
    teacher: Teacher, bank: SampleBank
) -> None:
    student = Student(teacher, QuantizationSettings(weight_bits=4, activation_bits=4))
    images = bank.take(slice(None)).images
    student.initialize_ranges_([images])
    exact, narrow = (Lesson(student, DistillationSettings(precision=each)) for each in ("float32", "bfloat16"))
    target, features = exact.teach(images)
    near, near_features = narrow.teach(images)
    assert near.dtype == torch.bfloat16
    assert float((near - target).norm() / target.norm()) < 0.02  # eight bits of mantissa
    assert len(near_features) == len(features)
    arguments = images, bank.soft_labels, target, features
    assert torch.equal(exact.losses(*arguments)[0], narrow.losses(*arguments)[0])


@pytest.mark.parametrize(
    ("device", "few", "many"), [("cpu", (100, 10**4), (100, 10**6)), ("cuda", (100, 10**6), (3000, 10))]
)
def test_few_steps_are_not_compiled(device: str, few: tuple[int, int], many: tuple[int, int]) -> None:
    place = torch.device(device)
    assert not is_compiled("auto", *few, place)
    assert is_compiled("auto", *many, place)
    assert is_compiled("always", *few, place)
    assert not is_compiled("never", *many, place)
    assert compiled(torch.relu, False, place) is torch.relu


def test_without_a_compiler_steps_go_on_uncompiled_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    def step(x: Tensor) -> Tensor:
        return (x.exp() + 1).log()

    with (
        torch.compiler.set_stance("default"),
        torch._inductor.utils.fresh_cache(),
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "compile_threads": 1}),
        caplog.at_level(logging.WARNING),
    ):
        fast = compiled(step, True, CPU)
        x = torch.ones(3)
        assert torch.equal(fast(x), step(x))
        assert torch.equal(fast(x), step(x))
    (record,) = caplog.records
    assert "not compiled" in record.getMessage()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
def test_products_have_the_precision_that_was_asked_for(precision: str) -> None:
    narrow = precision == "bfloat16" or (precision == "auto" and has_fast_bfloat16("cpu"))
    with autocast(precision, CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if narrow else torch.float32)


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (1, 2), (4, 2)])
def test_narrow_gradients_are_nearly_those_of_float32_and_what_is_computed_the_very_same(
    groups: int, stride: int
) -> None:
    gradients = []
    outputs = []
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    for precision in precisions:
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 8, 3, stride=stride, padding=1, groups=groups)
        x = torch.randn(2, 4, 9, 9, requires_grad=True)
        program = torch.export.export(nn.Sequential(layer), (x,)).module()
        assert isinstance(program, torch.fx.GraphModule)
        y = narrow_gradients_(program, precision)(x)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        outputs.append(y)
        gradients.append([each.grad for each in (x, *program.parameters())])
    assert torch.equal(*outputs)
    for exact, narrow in zip(*gradients, strict=True):
        assert float((exact - narrow).norm() / exact.norm()) < 0.01
    differ = any(not torch.equal(exact, narrow) for exact, narrow in zip(*gradients, strict=True))
    assert differ == (groups == 1)  # depthwise convolutions are slower in bfloat16


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [(3, 2, 1, (9, 12)), (5, 2, 2, (13, 8)), (3, (2, 1), (1, 0), (10, 10)), (2, 2, 0, (9, 9)), (3, 3, 0, (11, 10))],
)
def test_quick_gradients_are_those_of_the_convolution(kernel: Any, stride: Any, padding: Any, size: Any) -> None:
    layer = nn.Conv2d(6, 6, kernel, stride=stride, padding=padding, groups=6).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    program = torch.export.export(nn.Sequential(layer), (x,)).module()
    assert isinstance(program, torch.fx.GraphModule)
    (plain,) = torch.autograd.grad(program(x).square().sum(), x)
    (target,) = {node.target for node in quick_gradients_(program).graph.nodes if "conv" in node.name and node.args}
    assert target is not torch.ops.aten.conv2d.default
    assert torch.equal(program(x), layer(x))
    (quick,) = torch.autograd.grad(program(x).square().sum(), x)
    torch.testing.assert_close(quick, plain)


def test_only_depthwise_convolutions_with_strides_get_quick_gradients() -> None:
    layers = [nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(4, 8, 3, stride=2, groups=4)]
    program = torch.export.export(nn.Sequential(*layers), (torch.randn(1, 4, 19, 19),)).module()
    assert isinstance(program, torch.fx.GraphModule)
    before = [node.target for node in program.graph.nodes]
    assert [node.target for node in quick_gradients_(program).graph.nodes] == before
