"""What each of several processes comes to, started by tests/side_by_side.py -> a file of tensors for each."""

from pathlib import Path

import torch

from qimera.config.settings import DirectSettings, DistillationSettings, GeneratorSettings, SynthesisSettings
from qimera.machine.distributed import joined, rank
from qimera.pipeline import quantize, synthesize
from qimera.teacher.sources import load_model
from qimera.teacher.teacher import Teacher
from tests.command_line import SMALL, tiny_settings

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
