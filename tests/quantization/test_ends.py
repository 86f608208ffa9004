import pytest
from torch import Tensor, nn

from qimera.config.bits import parse_layer_bits
from qimera.config.settings import QuantizationSettings
from qimera.errors import ConfigError
from qimera.mixed_precision.allocation import allocate_bits
from qimera.mixed_precision.sensitivity import measure_sensitivity
from qimera.pipeline import quantize
from qimera.quantization.ends import first_and_last_layers, rules_beside_ends, with_rules_for_ends
from qimera.quantization.fake_quantize import MinMaxFakeQuantize
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher
from tests.networks import SPEC, Head, Lambda

W3A4 = {"weight_bits": 3, "activation_bits": 4}


def bits_of(teacher: Teacher, settings: QuantizationSettings) -> dict[str, tuple[int, int]]:
    student = Student(teacher, settings)
    return {layer.name: student.settings.bits_of(layer.name) for layer in teacher.layers}


@pytest.mark.parametrize("scheme", ["hardware", "paper"])
def test_both_ends_and_the_first_layers_output_get_their_bits(teacher: Teacher, scheme: str) -> None:
    """Layer conv2 reads what conv1 returns, through batch norm and ReLU."""
    found = bits_of(teacher, QuantizationSettings(first_last_bits=8, scheme=scheme, **W3A4))
    middle = dict.fromkeys(["conv3", "depthwise", "pointwise"], (3, 4))
    assert found == {"conv1": (8, 8), "conv2": (3, 8), **middle, "fc": (8, 8)}


class TwoStems(nn.Module):
    """Two convolutions of the image, added."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 4, 5, padding=2), nn.Conv2d(3, 4, 3, padding=1)
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wide(x) + self.narrow(x))


def test_every_layer_that_reads_the_images_is_a_first_one() -> None:
    assert first_and_last_layers(Teacher.capture(TwoStems(), SPEC)) == ["wide", "narrow", "head.fc"]


class Stem(nn.Module):
    """Convolution, pooling, and two layers that read them, then an addition and a layer that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Hardswish(), nn.MaxPool2d(2))
        self.left, self.right, self.joined = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.joined(self.left(x) + self.right(x)))


def test_every_layer_that_reads_the_stem_reads_it_at_the_bits_of_the_ends() -> None:
    found = bits_of(Teacher.capture(Stem(), SPEC), QuantizationSettings(first_last_bits=8, **W3A4))
    ends = {"stem.0": (8, 8), "head.fc": (8, 8)}
    assert found == {**ends, "left": (3, 8), "right": (3, 8), "joined": (3, 4)}


def test_a_layer_that_reads_the_stem_by_a_view_of_every_image_reads_it_at_the_bits_of_the_ends() -> None:
    view = Lambda(lambda x: x.view(x.size(0), -1))
    model = nn.Sequential(nn.Conv2d(3, 2, 4, 4), nn.ReLU(), view, nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 5))
    found = bits_of(Teacher.capture(model, SPEC), QuantizationSettings(first_last_bits=8, **W3A4))
    assert found == {"0": (8, 8), "3": (3, 8), "5": (8, 8)}


def test_bits_that_are_given_by_name_win(teacher: Teacher) -> None:
    given = parse_layer_bits("fc=w5a6")
    settings = QuantizationSettings(first_last_bits=8, layer_bits=given, **W3A4)
    assert bits_of(teacher, settings)["fc"] == (5, 6)
    assert rules_beside_ends(with_rules_for_ends(settings, teacher), teacher) == given


def test_settings_with_the_rules_stay_as_they_are(teacher: Teacher) -> None:
    settled = with_rules_for_ends(QuantizationSettings(first_last_bits=8), teacher)
    assert with_rules_for_ends(settled, teacher) is settled
    plain = QuantizationSettings()
    assert with_rules_for_ends(plain, teacher) is plain


def test_the_paper_scheme_reads_both_ends_from_relus_of_their_bits(teacher: Teacher) -> None:
    """Through pooling; and the ReLU behind the first layer, which conv2 reads. It does not quantize the image."""
    student = Student(teacher, QuantizationSettings(first_last_bits=8, scheme="paper", **W3A4))
    quantizers = [each for each in student.module.modules() if isinstance(each, MinMaxFakeQuantize)]
    activations = [each.quant_max - each.quant_min for each in quantizers if each.dtype.is_signed is False]
    assert activations == [255, 15, 15, 15, 255]


def test_a_budget_leaves_the_ends_alone(teacher: Teacher, bank: SampleBank) -> None:
    sensitivity = measure_sensitivity(teacher, bank, activations=False)
    allocation = allocate_bits(teacher, bank, "size=0.2", first_last_bits=8, sensitivity=sensitivity)
    assert [layer.name for layer in allocation.layers] == ["conv3", "depthwise", "pointwise"]
    found = QuantizationSettings(layer_bits=allocation.all_rules)
    assert found.bits_of("conv1") == found.bits_of("fc") == (8, 8)
    assert allocation.cost <= allocation.limit


def test_quantize_takes_the_bits_of_both_ends(teacher: Teacher, bank: SampleBank) -> None:
    student = quantize(teacher, bank, "w4a4", first_last_bits=6, recipe="ptq")
    levels = student.converted().get_submodule("fc").weight
    assert -32 <= int(levels.min()) < -8


def test_one_bit_is_refused_and_the_message_says_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match="first_last_bits: Input should be 0, 2, 3, 4, 5, 6, 7 or 8, given 1"):
        QuantizationSettings(first_last_bits=1)
