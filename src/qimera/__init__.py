"""Trained image classifiers -> low-bit integer models, without any data."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qimera.allocation import Allocation, allocate_bits
    from qimera.data import LabelledImages, load_labelled_images
    from qimera.diagnostics import Diagnosis, diagnose
    from qimera.errors import ConfigError, DivergenceError, QimeraError, UnsupportedModelError, VerificationError
    from qimera.estimation import Estimate, estimate_drop
    from qimera.evaluation import Evaluation, evaluate
    from qimera.export.comparison import Comparison, Verification
    from qimera.export.onnx import export_onnx
    from qimera.export.program import export_aotinductor, export_pt2
    from qimera.input_spec import InputSpec
    from qimera.pipeline import quantize, synthesize
    from qimera.progress import Progress
    from qimera.quantization.student import Student
    from qimera.recipes import RECIPE_NAMES, Recipe, recipe
    from qimera.run_settings import RunSettings
    from qimera.selection import choose
    from qimera.sensitivity import Sensitivity, measure_sensitivity
    from qimera.settings import (
        DirectSettings,
        DistillationSettings,
        GeneratorSettings,
        LabelSettings,
        LayerBits,
        QuantizationSettings,
        SynthesisSettings,
    )
    from qimera.synthesis.bank import SampleBank
    from qimera.teacher import Teacher

__all__ = [
    "RECIPE_NAMES",
    "Allocation",
    "Comparison",
    "ConfigError",
    "Diagnosis",
    "DirectSettings",
    "DistillationSettings",
    "DivergenceError",
    "Estimate",
    "Evaluation",
    "GeneratorSettings",
    "InputSpec",
    "LabelSettings",
    "LabelledImages",
    "LayerBits",
    "Progress",
    "QimeraError",
    "QuantizationSettings",
    "Recipe",
    "RunSettings",
    "SampleBank",
    "Sensitivity",
    "Student",
    "SynthesisSettings",
    "Teacher",
    "UnsupportedModelError",
    "Verification",
    "VerificationError",
    "allocate_bits",
    "choose",
    "diagnose",
    "estimate_drop",
    "evaluate",
    "export_aotinductor",
    "export_onnx",
    "export_pt2",
    "load_labelled_images",
    "measure_sensitivity",
    "quantize",
    "recipe",
    "synthesize",
]

# Imported when first used: torchao takes seconds, and `qimera --help` needs neither it nor torch.
_NAMES = {
    "qimera.allocation": ("Allocation", "allocate_bits"),
    "qimera.data": ("LabelledImages", "load_labelled_images"),
    "qimera.diagnostics": ("Diagnosis", "diagnose"),
    "qimera.errors": ("ConfigError", "DivergenceError", "QimeraError", "UnsupportedModelError", "VerificationError"),
    "qimera.estimation": ("Estimate", "estimate_drop"),
    "qimera.evaluation": ("Evaluation", "evaluate"),
    "qimera.export.onnx": ("export_onnx",),
    "qimera.export.program": ("export_aotinductor", "export_pt2"),
    "qimera.export.comparison": ("Comparison", "Verification"),
    "qimera.input_spec": ("InputSpec",),
    "qimera.pipeline": ("quantize", "synthesize"),
    "qimera.progress": ("Progress",),
    "qimera.quantization.student": ("Student",),
    "qimera.recipes": ("RECIPE_NAMES", "Recipe", "recipe"),
    "qimera.selection": ("choose",),
    "qimera.sensitivity": ("Sensitivity", "measure_sensitivity"),
    "qimera.run_settings": ("RunSettings",),
    "qimera.settings": (
        "DirectSettings",
        "DistillationSettings",
        "GeneratorSettings",
        "LabelSettings",
        "LayerBits",
        "QuantizationSettings",
        "SynthesisSettings",
    ),
    "qimera.synthesis.bank": ("SampleBank",),
    "qimera.teacher": ("Teacher",),
}


def __getattr__(name: str) -> object:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
