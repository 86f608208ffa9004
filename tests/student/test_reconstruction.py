"""reconstruction.py: integers trained block by block."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qimera import (
    DistillationSettings,
    InputSpec,
    QuantizationSettings,
    SampleBank,
    Student,
    SynthesisSettings,
    Teacher,
    quantize,
)
from qimera.config.settings import LayerBits
from qimera.machine.progress import Progress
from qimera.student import reconstruction
from qimera.student.blocks import first_blocks, part_of
from qimera.student.reconstruction import rate_factor, reconstruct_, relative_error, sharpness

SPEC = InputSpec(shape=(3, 24, 24), mean=(0.5,) * 3, std=(0.25,) * 3)


class Plain(nn.Module):
    """Two blocks of two layers each, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.depthwise, self.pointwise = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 16, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = F.relu(self.pointwise(F.relu(self.depthwise(x))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def images_of(seed: int, count: int = 48) -> Tensor:
    coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(24, 24), mode="bilinear")


@pytest.fixture(scope="module")
def plain() -> Teacher:
    torch.manual_seed(0)
    return Teacher.capture(Plain(), SPEC)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "_NUM_STEPS", 120)


def compensated(teacher: Teacher, bits: int) -> Student:
    student = Student(teacher, QuantizationSettings(weight_bits=bits, activation_bits=bits))
    student.initialize_layers_(images_of(0), torch.Generator().manual_seed(0))
    return student


def changed_by(student: Student, images: Tensor, held_out: Tensor, **given: int) -> list[str]:
    rng = torch.Generator().manual_seed(given.get("seed", 0))
    return reconstruct_(student.module, student.reference, images, held_out, given.get("num_blocks", 2), rng)


def state_of(student: Student) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in student.module.state_dict().items()}


def error_of(student: Student, images: Tensor) -> float:
    """Return the error behind both blocks, over the variance."""
    with torch.no_grad():
        mine = theirs = images
        for block in first_blocks(student.module, student.reference, 2):
            mine, theirs = part_of(student.module, block)(mine), part_of(student.reference, block)(theirs)
    return float(relative_error(mine, theirs))


def test_weights_on_the_same_grids_leave_less_error_behind_the_blocks_on_images_not_seen(plain: Teacher) -> None:
    student = compensated(plain, 3)
    before, steps = error_of(student, images_of(2)), [step for _, step in student.weight_steps()]
    assert len(changed_by(student, images_of(0), images_of(1))) == 2
    assert error_of(student, images_of(2)) < 0.98 * before
    for (weight, step), before in zip(student.weight_steps(), steps, strict=True):
        assert torch.equal(step, before)
        counted = weight.detach() / step
        assert (counted - counted.round()).abs().max() < 1e-4
        assert counted.abs().max() < 4 + 1e-4


def test_layers_behind_are_rounded_again_for_what_they_read_now(plain: Teacher) -> None:
    student = compensated(plain, 3)
    before = state_of(student)
    assert len(changed_by(student, images_of(0), images_of(1), num_blocks=1)) == 1
    after = state_of(student)
    assert not torch.equal(before["pointwise.weight"], after["pointwise.weight"])
    assert not torch.equal(before["fc.bias"], after["fc.bias"])


def test_a_block_of_more_bits_behind_a_changed_one_is_rounded_again_too(plain: Teacher) -> None:
    rules = tuple(LayerBits(pattern=name, weight_bits=3, activation_bits=8) for name in ("depthwise", "pointwise"))
    student = Student(plain, QuantizationSettings(weight_bits=3, activation_bits=3, layer_bits=rules))
    student.initialize_layers_(images_of(0), torch.Generator().manual_seed(0))
    before = state_of(student)
    assert len(changed_by(student, images_of(0), images_of(1))) == 1
    after = state_of(student)
    for name in ("conv2", "depthwise", "pointwise", "fc"):
        assert not torch.equal(before[f"{name}.bias"], after[f"{name}.bias"]), name


def test_blocks_whose_held_out_error_does_not_fall_are_restored_bit_for_bit(plain: Teacher) -> None:
    student = compensated(plain, 3)
    before = state_of(student)
    unlike = 100 * torch.randn(16, *SPEC.shape, generator=torch.Generator().manual_seed(5)).abs()
    assert changed_by(student, unlike, images_of(0)) == []
    after = state_of(student)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_network_whose_first_blocks_hold_an_addition_stays_as_it_is() -> None:
    class Residual(Plain):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv2(F.relu(self.conv1(x))))
            x = F.pad(x, (0, 0, 0, 0, 0, 4)) + self.pointwise(F.relu(self.depthwise(x)))
            out: Tensor = self.fc(F.relu(x).mean((2, 3)))
            return out

    torch.manual_seed(0)
    student = compensated(Teacher.capture(Residual(), SPEC), 3)
    before = state_of(student)
    assert changed_by(student, images_of(0), images_of(1), num_blocks=1) == ["relu_1"]
    student.module.load_state_dict(before)
    assert changed_by(student, images_of(0), images_of(1), num_blocks=2) == []
    after = state_of(student)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bits", [5, 8])
def test_students_of_more_than_four_bits_stay_as_they_are_and_nothing_is_drawn(plain: Teacher, bits: int) -> None:
    student, rng = compensated(plain, bits), torch.Generator().manual_seed(0)
    before, drawn = state_of(student), rng.get_state()
    told: list[int] = []
    reconstruct_(
        student.module, student.reference, images_of(0), images_of(1), 2, rng, lambda done, total: told.append(done)
    )
    after = state_of(student)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(rng.get_state(), drawn)
    assert told == []


def test_the_same_generator_gives_the_same_student_and_it_tells_how_far_it_is(plain: Teacher) -> None:
    students, told = [compensated(plain, 3) for _ in range(2)], []
    for student in students:
        rng = torch.Generator().manual_seed(3)
        reconstruct_(
            student.module, student.reference, images_of(0), images_of(1), 1, rng, lambda *counts: told.append(counts)
        )
    first, second = (state_of(student) for student in students)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert told == 2 * [(0, 1), (1, 1)]


@pytest.mark.parametrize(("bits", "counts"), [("w3a3", [0, 1]), ("w8a8", [])])
def test_quantize_does_it_where_settings_say_so_and_bits_are_few(plain: Teacher, bits: str, counts: list[int]) -> None:
    made = SynthesisSettings(num_optimized=40, num_held_out=8)
    bank = SampleBank.from_images(images_of(0), torch.full((48, 10), 0.1), plain, made, 0)
    told: list[Progress] = []
    without = DistillationSettings(num_steps=0, start="compensated")
    settings = without.replace(reconstructed_blocks=1)
    student = quantize(plain, bank, bits, settings=settings, progress=told.append)
    assert [each.step for each in told if each.stage == "reconstruction"] == counts
    with torch.no_grad():
        assert torch.equal(student.converted()(images_of(3)), student.module(images_of(3)))
    if not counts:
        expected, after = state_of(quantize(plain, bank, bits, settings=without)), state_of(student)
        assert all(torch.equal(expected[name], after[name]) for name in expected)


def test_the_relative_error_is_that_of_plain_loops() -> None:
    mine, theirs = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    wrong = variance = 0.0
    for channel in range(3):
        values = theirs[:, channel].flatten().tolist()
        mean = sum(values) / len(values)
        variance += sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        pairs = zip(mine[:, channel].flatten().tolist(), values, strict=True)
        wrong += sum((a - b) ** 2 for a, b in pairs) / len(values)
    assert float(relative_error(mine, theirs)) == pytest.approx(wrong / variance, rel=1e-5)


def test_rates_start_anew_beside_integers_and_the_pull_becomes_blunt() -> None:
    assert [rate_factor(done) for done in (0.0, 0.5, 0.75, 0.875)] == pytest.approx([1.0, 0.5, 1.0, 0.5])
    assert [sharpness(done) for done in (0.2, 0.675, 0.74)] == pytest.approx([20.0, 2.0, 2.0])
