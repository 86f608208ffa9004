"""Real trained classifiers and labelled images outside of the repository -> teachers and test sets.

The folder is named by QIMERA_ZOO (default: ../shared beside the repository) and holds a file zoo.py that offers
``TEACHERS``, ``load_teacher`` and ``load_images``.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
from torch import nn

from benchmarks.teachers.networks import BUILDERS, INPUT_SPEC, load_network
from qimera import InputSpec, LabelledImages, Teacher
from qimera.teacher.sources import EMBEDDED_MODELS, load_model

FOLDER = Path(os.environ.get("QIMERA_ZOO", Path(__file__).resolve().parents[2] / "shared"))


def load_zoo() -> ModuleType | None:
    """Return the zoo's module, or None where there is none."""
    path = FOLDER / "zoo.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("qimera_zoo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_subject(name: str) -> tuple[Teacher, LabelledImages]:
    """Return the teacher called ``name``, of the zoo or embedded in the package, and the images that score it."""
    model = load_model_of(name)
    if name in EMBEDDED_MODELS:
        from benchmarks.mnist import load_mnist_split  # beside this file, which tests import from elsewhere

        return Teacher.capture(model, EMBEDDED_MODELS[name].input_spec), load_mnist_split().held_out
    if name in BUILDERS:
        return Teacher.capture(model, INPUT_SPEC), load_labelled("cifar10_test")
    entry = _zoo().TEACHERS[name]
    labelled = load_labelled(entry.image_set)
    side = labelled.images.shape[1]
    spec = InputSpec(shape=(3, side, side), mean=entry.mean, std=entry.std)
    return Teacher.capture(model, spec), labelled


def load_model_of(name: str) -> nn.Module:
    """Return the network called ``name``, of the zoo or embedded in the package."""
    if name in BUILDERS:
        return load_network(name)
    model: nn.Module = load_model(name) if name in EMBEDDED_MODELS else _zoo().load_teacher(name)
    return model


def load_labelled(image_set: str) -> LabelledImages:
    """Return the zoo's images of that name, with their labels."""
    return LabelledImages(*_zoo().load_images(image_set))


def _zoo() -> ModuleType:
    zoo = load_zoo()
    if zoo is None:
        raise SystemExit(f"no zoo.py in {FOLDER}; set QIMERA_ZOO to the folder of trained models")
    return zoo


def load_training_images(name: str) -> np.ndarray:
    """Return the images that the network called ``name`` was trained on, (n, height, width, 3), for ceilings alone."""
    zoo = load_zoo()
    assert zoo is not None
    training_set = "cifar10_train" if name in BUILDERS else zoo.TEACHERS[name].image_set.partition("_")[0] + "_train"
    try:
        images: np.ndarray = zoo.load_images(training_set)[0]
    except FileNotFoundError:
        raise SystemExit(f"{name}: there is no {training_set} to train on") from None
    return images
