"""Real trained classifiers and labelled images outside of the repository -> teachers and test sets.

The folder is named by QIMERA_ZOO (default: ../shared beside the repository) and holds a file zoo.py that offers
``TEACHERS``, ``load_teacher`` and ``load_images``.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from qimera import InputSpec, LabelledImages, Teacher

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
    """Return the teacher called ``name`` and the images that score it."""
    zoo = load_zoo()
    if zoo is None:
        raise SystemExit(f"no zoo.py in {FOLDER}; set QIMERA_ZOO to the folder of trained models")
    entry = zoo.TEACHERS[name]
    images, labels = zoo.load_images(entry.image_set)
    side = images.shape[1]
    spec = InputSpec(shape=(3, side, side), mean=entry.mean, std=entry.std)
    return Teacher.capture(zoo.load_teacher(name), spec), LabelledImages(images, labels)
