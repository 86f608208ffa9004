"""What each of several processes comes to, started by tests/side_by_side.py -> a file of tensors for each."""

from pathlib import Path

import torch

from qimera.config.settings import DirectSettings, DistillationSettings, GeneratorSettings, SynthesisSettings
from qimera.machine.distributed import joined, own_share, pooled_variances, rank, world_size
from qimera.pipeline import quantize, synthesize
from qimera.quantization.fake_quantize import LearnedStepFakeQuantize
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.sources import load_model
from qimera.teacher.teacher import Teacher
from tests.command_line import SMALL, tiny_settings
from tests.networks import SPEC, TinyNet

OPTIMIZED = SynthesisSettings(
    num_optimized=48, num_held_out=8, direct=DirectSettings(num_steps=3, batch_size=16, precision="float32")
)
GENERATED = SynthesisSettings(
    num_optimized=0,
    num_generated=32,
    generator=GeneratorSettings(num_steps=4, batch_size=16, base_channels=8, mapping_dim=8),
)
STUDENTS = {
    "start": DistillationSettings(num_steps=0),
    "plain": DistillationSettings(num_steps=3, batch_size=9, feature_weight=0, precision="float32"),
    "features": DistillationSettings(num_steps=3, batch_size=16, precision="float32"),
    "chosen": DistillationSettings(num_steps=8, batch_size=8, select_every=4, start="compensated"),
}


def write_into(folders: list[str]) -> None:
    """Write banks and students into the one folder, as 0.pt, 1.pt and so on."""
    teacher = Teacher.capture(load_model(SMALL), tiny_settings().input)
    with joined():
        bank = synthesize(teacher, settings=OPTIMIZED)
        generated = synthesize(teacher, settings=GENERATED)
        found = {"bank": {"pixels": bank.pixels, "soft_labels": bank.soft_labels}}
        found["generated"] = {"pixels": generated.pixels}
        for name, settings in STUDENTS.items():
            found[name] = quantize(teacher, bank, settings=settings).module.state_dict()
        beside = STUDENTS["plain"].model_copy(update={"fresh_share": 0.5, "generator_steps_per_step": 1})
        found["beside"] = quantize(teacher, generated, settings=beside).module.state_dict()
        torch.save(found, Path(folders[0]) / f"{rank()}.pt")


def write_starts_into(folders: list[str]) -> None:
    """Write students whose first ranges and scales every process would find on samples of its own, likewise."""
    torch.manual_seed(0)
    teacher = Teacher.capture(TinyNet(), SPEC)
    with joined():
        own = _bank_of(rank(), teacher)
        nearest, compensated = (DistillationSettings(num_steps=0, start=start) for start in ("nearest", "compensated"))
        found = {
            "nearest": _all_of(quantize(teacher, own, settings=nearest)),
            "compensated": _all_of(quantize(teacher, own, settings=compensated)),
        }
        for name, seed in ("one seed", 0), ("own seed", rank()):
            settings = DistillationSettings(num_steps=2, batch_size=8, precision="float32")
            found[name] = quantize(teacher, _bank_of(0, teacher), settings=settings, seed=seed).module.state_dict()
        values = (
            torch.linspace(-1, 3, 6).square().view(3, 2)
        )  # three samples: two for the one process, one for the other
        part = values[own_share(3)]
        variances = pooled_variances([part, part[:, :1]], len(part) * world_size() / 3) or []
        found["variances"] = {str(index): each for index, each in enumerate(variances)}
        torch.save(found, Path(folders[0]) / f"{rank()}.pt")


def _bank_of(seed: int, teacher: Teacher) -> SampleBank:
    """Return a bank of noise, the darker the lower ``seed``."""
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(80 * seed, 256, (32, *SPEC.shape), generator=rng).to(torch.uint8)
    soft_labels = torch.eye(teacher.num_classes)[torch.arange(32) % teacher.num_classes]
    return SampleBank.from_pixels(pixels, soft_labels, teacher, SynthesisSettings(num_optimized=32), seed)


def _all_of(student: Student) -> dict[str, torch.Tensor]:
    """Return what the student computes with: its state, its levels, its scales and its reference's state."""
    quantizers = [each for each in student.module.modules() if isinstance(each, LearnedStepFakeQuantize)]
    return {
        **student.module.state_dict(),
        **{f"low {index}": torch.as_tensor(each.low) for index, each in enumerate(quantizers)},
        **{f"high {index}": torch.as_tensor(each.high) for index, each in enumerate(quantizers)},
        **{f"scale {name}": scale for name, scale in student.channel_scales.items()},
        **{f"reference {name}": value for name, value in student.reference.state_dict().items()},
    }
