"""What the tests of the command line share: how to call it, a user's model file, and settings of a tiny run."""

import re
from pathlib import Path

from typer.testing import CliRunner, Result

from qimera.cli.app import app
from qimera.config.input_spec import InputSpec
from qimera.config.run_settings import RunSettings
from qimera.config.settings import (
    DirectSettings,
    DistillationSettings,
    QuantizationSettings,
    SynthesisSettings,
)

MODEL_FILE = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 3)
    )


def build_without_batch_norm():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 3))


def build_broken():
    model = build()
    nn.init.constant_(model[4].weight, float("nan"))
    return model


def build_overflowing():
    model = build()
    nn.init.constant_(model[0].weight, 1e30)
    nn.init.constant_(model[4].weight, 1e30)
    return model


def build_until_interrupted():
    raise KeyboardInterrupt
"""
SMALL = f"{Path(__file__).with_name('small_classifier.py')}:build"
SMALL_INPUT = InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.25,))
INPUT = ("--input-shape", "1,8,8", "--mean", "0.5", "--std", "0.25")


def qimera(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def said(result: Result) -> str:
    """Return stderr on one line."""
    return re.sub(r"\s+", " ", result.stderr)


def tiny_settings(model: str = SMALL, **changes: object) -> RunSettings:
    """Return settings of a run that takes a second."""
    synthesis = SynthesisSettings(num_optimized=16, direct=DirectSettings(num_steps=2, batch_size=16))
    distillation = DistillationSettings(num_steps=3, batch_size=8)
    values = {"synthesis": synthesis, "quantization": QuantizationSettings(), "distillation": distillation}
    return RunSettings(**{"model": model, "recipe": "tiny", "input": SMALL_INPUT, **values, **changes})


def run_tiny_settings(folder: Path) -> Path:
    """Carry out ``tiny_settings`` in ``folder``, and return the run's directory."""
    tiny_settings().save(folder / "settings.json")
    result = qimera("quantize", "--settings", folder / "settings.json", "--output", folder / "run")
    assert result.exit_code == 0, result.stderr
    return folder / "run"


def write_model_file(folder: Path) -> Path:
    """Write what a user might bring, and a few things that no user should."""
    path = folder / "toy.py"
    path.write_text(MODEL_FILE)
    return path
