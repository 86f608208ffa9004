"""Trained image classifiers -> low-bit integer models, without any data."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qimera.assessment.data import LabelledImages, load_labelled_images
    from qimera.assessment.diagnostics import Diagnosis, diagnose
    from qimera.assessment.estimation import Estimate, estimate_drop
    from qimera.assessment.evaluation import Evaluation, evaluate
    from qimera.assessment.selection import choose
    from qimera.config.input_spec import InputSpec
    from qimera.config.recipes import RECIPE_NAMES, Recipe, recipe
    from qimera.config.run_settings import RunSettings
    from qimera.config.settings import (
        DirectSettings,
        DistillationSettings,
        GeneratorSettings,
        LabelSettings,
        LayerBits,
        QuantizationSettings,
        SynthesisSettings,
    )
    from qimera.errors import ConfigError, DivergenceError, QimeraError, UnsupportedModelError, VerificationError
    from qimera.export.comparison import Comparison, Verification
    from qimera.export.onnx import export_onnx
    from qimera.export.program import export_aotinductor, export_pt2
    from qimera.machine.progress import Progress
    from qimera.mixed_precision.allocation import Allocation, allocate_bits
    from qimera.mixed_precision.sensitivity import Sensitivity, measure_sensitivity
    from qimera.pipeline import quantize, synthesize
    from qimera.quantization.student import Student
    from qimera.synthesis.bank import SampleBank
    from qimera.teacher.teacher import Teacher

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
    "qimera.mixed_precision.allocation": ("Allocation", "allocate_bits"),
    "qimera.assessment.data": ("LabelledImages", "load_labelled_images"),
    "qimera.assessment.diagnostics": ("Diagnosis", "diagnose"),
    "qimera.errors": ("ConfigError", "DivergenceError", "QimeraError", "UnsupportedModelError", "VerificationError"),
    "qimera.assessment.estimation": ("Estimate", "estimate_drop"),
    "qimera.assessment.evaluation": ("Evaluation", "evaluate"),
    "qimera.export.onnx": ("export_onnx",),
    "qimera.export.program": ("export_aotinductor", "export_pt2"),
    "qimera.export.comparison": ("Comparison", "Verification"),
    "qimera.config.input_spec": ("InputSpec",),
    "qimera.pipeline": ("quantize", "synthesize"),
    "qimera.machine.progress": ("Progress",),
    "qimera.quantization.student": ("Student",),
    "qimera.config.recipes": ("RECIPE_NAMES", "Recipe", "recipe"),
    "qimera.assessment.selection": ("choose",),
    "qimera.mixed_precision.sensitivity": ("Sensitivity", "measure_sensitivity"),
    "qimera.config.run_settings": ("RunSettings",),
    "qimera.config.settings": (
        "DirectSettings",
        "DistillationSettings",
        "GeneratorSettings",
        "LabelSettings",
        "LayerBits",
        "QuantizationSettings",
        "SynthesisSettings",
    ),
    "qimera.synthesis.bank": ("SampleBank",),
    "qimera.teacher.teacher": ("Teacher",),
}


def __getattr__(name: str) -> object:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
