"""Networks that are refused when they are captured, each by its name, and what is told of others."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.errors import UnsupportedModelError
from qimera.teacher.teacher import Teacher
from tests.networks import SPEC, Lambda, behind_stem
from tests.shared import noise


def test_a_network_that_cannot_be_copied_is_refused_by_name() -> None:
    class Uncopyable(nn.Identity):
        def __deepcopy__(self, memo: dict[int, object]) -> "Uncopyable":
            raise RuntimeError("holds a lock")

    with pytest.raises(UnsupportedModelError, match=r"Sequential cannot be copied \(holds a lock\)"):
        Teacher.capture(behind_stem(Uncopyable()), SPEC)


@pytest.mark.parametrize("key", ["in", "gr\u00f6\u00dfe"])
def test_a_layer_whose_name_cannot_be_stored_is_refused_by_it(key: str) -> None:
    layers = nn.ModuleDict({key: nn.Conv2d(8, 8, 3)})
    model = behind_stem(Lambda(lambda x: layers[key](x)))
    model[3].layers = layers
    with pytest.raises(UnsupportedModelError, match=rf"3.layers.{key}.weight: names of layers .*rename this one"):
        Teacher.capture(model, SPEC)


def test_a_network_without_values_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Sequential cannot be copied .*load its state_dict"):
        Teacher.capture(behind_stem().to("meta"), SPEC)


@pytest.mark.parametrize("softmax", [nn.Softmax(1), nn.Softmax(-1), nn.LogSoftmax(1)])
def test_a_softmax_at_the_end_is_taken_off_and_that_is_told(
    softmax: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    model = behind_stem()
    with caplog.at_level(logging.WARNING, "qimera"):
        teacher = Teacher.capture(nn.Sequential(model, softmax), SPEC)
    assert "Sequential returns probabilities" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(teacher(noise(4)), model(noise(4)), rtol=1e-4, atol=1e-5)


class DropsAlways(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fake = torch.ao.quantization.FakeQuantize()  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        return x


class Counts(nn.Module):
    """Answers differently in every call, without a random number."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class AlwaysTraining(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True)


class OtherWhenExported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if torch.compiler.is_exporting() else x


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout in evaluation": (DropsAlways, r"dropout of Sequential drops values at random .*training=self\.training"),
    "noise": (Noisy, r"calls aten\.randn_like\.default, which qimera does not know"),
    "fake quantizers": (Quantized, r"3\.fake \(FakeQuantize\) quantizes already; give the network in floating point"),
    "a counter": (Counts, "answers differently when it is asked again"),
    "training mode": (
        lambda: AlwaysTraining(8),
        r"batch_norm_1 of Sequential normalises by the statistics of the batch",
    ),
    "statistics of the batch": (
        lambda: nn.BatchNorm2d(8, track_running_stats=False),
        "answers differently for an image when other images are in the batch",
    ),
    "another graph": (OtherWhenExported, r"gives other logits than Sequential itself \(by \d+\.\d%"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_go_silently_wrong_is_refused_by_name(case: str) -> None:
    build, message = REFUSED[case]
    model = behind_stem()
    model.insert(3, build())
    with pytest.raises(UnsupportedModelError, match=message):
        Teacher.capture(model.eval(), SPEC)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_torchscript_program_is_refused_by_name() -> None:
    script = torch.jit.trace(behind_stem(), noise(4))  # type: ignore[no-untyped-call]
    with pytest.raises(UnsupportedModelError, match=r"a TorchScript program.*give the nn\.Module"):
        Teacher.capture(script, SPEC)


def test_a_program_in_training_mode_is_refused_with_the_way_out() -> None:
    batch = {0: torch.export.Dim.DYNAMIC}
    model = behind_stem().train()
    for norm in [module for module in model if isinstance(module, nn.BatchNorm2d)]:
        norm.momentum = 0.1
    program = torch.export.export(model, (noise(4),), dynamic_shapes=(batch,))
    with pytest.raises(UnsupportedModelError, match=r"call model\.eval\(\) before torch\.export\.export"):
        Teacher.capture(program.module(check_guards=False), SPEC)


def test_the_first_value_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = behind_stem(Lambda(lambda x: x.sigmoid()), Lambda(lambda x: x.tanh()))

    def wrong(module: torch.fx.GraphModule) -> None:
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default):
            node.target = torch.ops.aten.sigmoid.default
        module.recompile()

    monkeypatch.setattr("qimera.teacher.capture.simplify_", wrong)
    with pytest.raises(UnsupportedModelError, match="the first value that differs is tanh"):
        Teacher.capture(model, SPEC)
