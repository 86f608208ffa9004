"""Trained image classifiers -> low-bit integer models, without any data."""

from qimera.data import LabelledImages, load_labelled_images
from qimera.errors import ConfigError, DivergenceError, QimeraError, UnsupportedModelError, VerificationError
from qimera.evaluation import Evaluation, evaluate
from qimera.pipeline import quantize, synthesize
from qimera.progress import Progress
from qimera.quantization.student import Student
from qimera.recipes import RECIPE_NAMES, Recipe, recipe
from qimera.settings import (
    DirectSettings,
    DistillationSettings,
    GeneratorSettings,
    InputSpec,
    LabelSettings,
    LayerBits,
    QuantizationSettings,
    RunSettings,
    SynthesisSettings,
)
from qimera.synthesis.bank import SampleBank
from qimera.teacher import Teacher

__all__ = [
    "RECIPE_NAMES",
    "ConfigError",
    "DirectSettings",
    "DistillationSettings",
    "DivergenceError",
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
    "Student",
    "SynthesisSettings",
    "Teacher",
    "UnsupportedModelError",
    "VerificationError",
    "evaluate",
    "load_labelled_images",
    "quantize",
    "recipe",
    "synthesize",
]
