"""Networks as users have them: wrapped, in other precisions, with regions, writes and constants of every kind."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

from qimera.config.settings import QuantizationSettings
from qimera.student.student import Student
from qimera.teacher.teacher import Teacher
from tests.networks import NUM_CLASSES, SPEC, Lambda, TinyNet, behind_stem, calibrated
from tests.shared import noise


@torch.no_grad()
def assert_captured(model: nn.Module, expected: Tensor | None = None) -> Teacher:
    """Assert that the teacher and a student of 8 bits answer as ``model`` does, and return the teacher."""
    expected = model(noise(4)) if expected is None else expected
    teacher = Teacher.capture(model, SPEC)
    assert (teacher(noise(4)) - expected).abs().max() <= 1e-4 * expected.abs().max()
    student = Student(teacher, QuantizationSettings(weight_bits=8, activation_bits=8))
    student.initialize_ranges_([noise(4)])
    assert (student(noise(4)) - expected).abs().max() <= 0.15 * expected.abs().max()
    return teacher


# --- wrappers and copies ----------------------------------------------------------------------------------------------


class TakesAnything(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        result: Tensor = self.model(*args, **kwargs)
        return result


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda model: torch.compile(model),  # type: ignore[return-value]
    "AveragedModel": AveragedModel,
    "compiled and averaged": lambda model: AveragedModel(torch.compile(model)),  # type: ignore[arg-type]
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_of_pytorch_is_taken_off(tiny_model: TinyNet, teacher: Teacher, name: str) -> None:
    captured = Teacher.capture(WRAPPERS[name](copy.deepcopy(tiny_model)), SPEC)
    assert [layer.name for layer in captured.layers] == [layer.name for layer in teacher.layers]
    assert captured.hash == teacher.hash


class ReturnsNothing(nn.Sequential):
    """Keeps its batch norms in evaluation mode, and forgets to return itself as ``nn.Module.train`` does."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def test_a_network_whose_own_train_returns_nothing_is_captured() -> None:
    assert_captured(ReturnsNothing(*behind_stem()))


class Bare(nn.Module):
    """Holds weights itself, and no layers."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(8, 3, 3, 3, generator=rng))
        self.second = nn.Parameter(torch.randn(8, 8, 3, 3, generator=rng))
        self.last = nn.Parameter(torch.randn(NUM_CLASSES, 8, 1, 1, generator=rng))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, weight in zip(self.norms, (self.first, self.second), strict=True):
            x = F.relu(norm(F.conv2d(x, weight, padding=1)))
        return F.conv2d(F.adaptive_avg_pool2d(x, 1), self.last).flatten(1)


def test_weights_of_the_network_itself_are_layers_of_their_names() -> None:
    teacher = assert_captured(calibrated(Bare()).requires_grad_(False))
    assert [layer.name for layer in teacher.layers] == ["first", "second", "last"]
    student = Student(teacher, QuantizationSettings())
    assert list(student.layer_names().values()) == ["first", "second", "last"]


def test_a_network_that_takes_any_arguments_is_captured(tiny_model: TinyNet) -> None:
    assert_captured(TakesAnything(tiny_model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_computed_in_float32(tiny_model: TinyNet, dtype: torch.dtype) -> None:
    model = copy.deepcopy(tiny_model).to(dtype)
    teacher = assert_captured(model, copy.deepcopy(model).float()(noise(4)).detach())
    assert next(model.parameters()).dtype == dtype
    assert next(teacher.parameters()).dtype == torch.float32


class Caches(nn.Module):
    """Keeps what it computed, as attention biases in some networks are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.cache = nn.Conv2d(8, 8, 3), {}

    def forward(self, x: Tensor) -> Tensor:
        self.cache["last"] = self.conv(x)
        return self.cache["last"] + 0


class ExtraState(nn.Module):
    def get_extra_state(self) -> object:
        return {"version": 1}

    def set_extra_state(self, state: object) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return x


def pruned() -> nn.Module:
    layer = nn.Conv2d(8, 8, 3)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


UNUSUAL: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: weight_norm(nn.Conv2d(8, 8, 3)),
    "weight norm, parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
    "spectral norm": lambda: spectral_norm(nn.Conv2d(8, 8, 3)),
    "pruned": pruned,
    "extra state that is no tensor": ExtraState,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", UNUSUAL)
def test_layers_that_are_not_plain_modules_are_captured(name: str) -> None:
    model = behind_stem(UNUSUAL[name]())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(noise(4))  # as its owner runs it, with gradients recorded
    assert_captured(model)


def test_a_network_that_keeps_what_it_computed_is_captured() -> None:
    model = behind_stem(Caches()).requires_grad_(True)
    model(noise(4))
    assert_captured(model)


# --- regions, writes and constants ------------------------------------------------------------------------------------


class Region(nn.Module):
    def __init__(self, context: Callable[[], object]) -> None:
        super().__init__()
        self.context, self.body = context, nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        with self.context():  # type: ignore[attr-defined]
            result: Tensor = self.body(x)
        return result.float()


REGIONS: dict[str, Callable[[], object]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("name", REGIONS)
def test_layers_in_a_region_are_layers_of_the_network(name: str) -> None:
    model = behind_stem(Region(REGIONS[name]))
    teacher = Teacher.capture(model, SPEC)
    assert [layer.name for layer in teacher.layers] == ["0", "3.body.0", "4.fc"]
    assert [tap.name for tap in teacher.batch_norms] == ["1", "3.body.1"]


def write_into_part(x: Tensor) -> Tensor:
    x = x * 1
    x[:, :2] *= 2
    return x


def rectify_half(x: Tensor) -> Tensor:
    half, other = x.chunk(2, 1)
    return torch.cat([F.leaky_relu(half - 1, inplace=True), F.relu_(other)], 1) + x


def rectify_what_is_viewed(x: Tensor) -> Tensor:
    x = x - 1
    view = x.flatten(2)
    return F.relu(x, inplace=True) + view.mean(2)[..., None, None]


WRITES = {"into a part": write_into_part, "into a chunk": rectify_half, "behind a view": rectify_what_is_viewed}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_in_place_is_seen_by_all_that_read_it(name: str) -> None:
    assert_captured(behind_stem(Lambda(WRITES[name])))


def test_a_network_that_writes_into_its_images_is_captured() -> None:
    model = nn.Sequential(Lambda(lambda x: x.sub_(0.3).mul_(2)), *behind_stem()).eval()
    assert_captured(model, model(noise(4)))


def with_constant(function: Callable[[Tensor, Tensor], Tensor], value: Tensor, *, fixed: bool) -> nn.Module:
    return behind_stem(Lambda(function, value, fixed=fixed), nn.Conv2d(8, 8, 3))


PER_CHANNEL = torch.linspace(0.5, 1.5, 8)
CONSTANTS: dict[str, Callable[[], nn.Module]] = {
    "mean behind a view": lambda: with_constant(lambda x, m: x - m.view(1, 8, 1, 1), PER_CHANNEL, fixed=True),
    "std behind an index": lambda: with_constant(lambda x, s: x / s[None, :, None, None], PER_CHANNEL, fixed=True),
    "frozen batch norm": lambda: with_constant(
        lambda x, v: x * (v.reshape(1, -1, 1, 1) + 1e-5).rsqrt(), PER_CHANNEL, fixed=True
    ),
    "mask": lambda: with_constant(
        lambda x, m: torch.where(m[:, None, None] > 0, x, torch.zeros(())), PER_CHANNEL - 1, fixed=True
    ),
    "layer scale": lambda: with_constant(lambda x, g: x + x * g.view(-1, 1, 1), PER_CHANNEL, fixed=False),
    "concatenated parameter": lambda: with_constant(
        lambda x, p: torch.cat([x[:, :4], p.expand(x.shape[0], 4, 16, 16)], 1), torch.randn(4, 16, 16), fixed=False
    ),
    "positions": lambda: with_constant(lambda x, _: x + torch.arange(16.0) / 16, PER_CHANNEL, fixed=True),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_told_from_activations(name: str) -> None:
    assert_captured(CONSTANTS[name]())


def test_a_parameter_behind_a_view_can_still_be_trained() -> None:
    teacher = Teacher.capture(CONSTANTS["layer scale"](), SPEC)
    names = [name for name, _ in Student(teacher, QuantizationSettings()).module.named_parameters()]
    assert any(re.fullmatch(r"3\.constant_\w+", name) for name in names)


def test_a_batch_norm_of_tokens_is_not_folded_into_features() -> None:
    tokens, back = Lambda(lambda x: x.flatten(2).transpose(1, 2)), Lambda(lambda x: x.transpose(1, 2)[..., None])
    model = behind_stem(nn.AdaptiveAvgPool2d((2, 4)), tokens, nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), back)
    assert [tap.name for tap in assert_captured(model).batch_norms] == ["1", "6"]


class Last(nn.Module):
    def forward(self, x: tuple[Tensor, object]) -> Tensor:
        return x[0][:, -1, :, None, None]


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_stays_in_floating_point(layer: type[nn.Module]) -> None:
    tokens = Lambda(lambda x: x.flatten(2).transpose(1, 2))
    teacher = assert_captured(behind_stem(nn.AvgPool2d(4), tokens, layer(8, 8, batch_first=True), Last()))
    assert [each.name for each in teacher.layers] == ["0", "7.fc"]


def test_a_map_that_is_viewed_as_a_row_is_captured() -> None:
    """In memory the teacher's maps have their channels last, so that no view of them is such a row."""
    row = Lambda(lambda x: x.view(x.size(0), -1))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), row, nn.Linear(128, 5))
    assert_captured(calibrated(model).requires_grad_(False))


def test_a_bias_that_depends_on_the_image_is_an_activation() -> None:
    weight = torch.randn(8, 8, 1, 1)
    assert_captured(behind_stem(Lambda(lambda x, w: F.conv2d(x, w, 0 * x.mean((0, 2, 3)) + 1), weight)))


def test_a_model_with_hooks_keeps_them_for_itself() -> None:
    model, seen = behind_stem(), []
    model.register_forward_hook(lambda *_: seen.append(1))
    assert_captured(model)
    assert len(seen) >= 1
    assert model(noise(4)).shape == (4, NUM_CLASSES)
