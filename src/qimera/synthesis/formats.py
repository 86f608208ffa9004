"""A bank -> files that other tools read."""

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from qimera.config.input_spec import IMAGE_MODES
from qimera.errors import ConfigError
from qimera.machine.files import make_folder, naming, save_tensors, sync_directory, sync_tree
from qimera.synthesis.bank import SampleBank

BankFormat = Literal["bank", "npz", "imagefolder", "safetensors"]


def write_bank(bank: SampleBank, path: Path | str, form: BankFormat = "bank") -> None:
    """Write the samples of ``bank``, whole or not at all.

    Args:
        bank: What to write; held-out samples too, last.
            Images of the user's are written only if they are to be kept.
        path: What becomes of it, a directory or a file.
        form: ``bank``: the directory that qimera reads. ``npz``: one file of ``images`` (sample, height, width,
            channel; uint8), ``labels`` (the class of the largest share), ``soft_labels`` and the teacher's ``logits``.
            ``imagefolder``: a folder of PNG files for each class, as torchvision's ``ImageFolder`` reads them, with
            ``soft_labels.csv`` beside them. ``safetensors``: one file of ``pixels`` (sample, channel, height, width;
            uint8), ``soft_labels`` and ``logits``. All of them say in what range pixels are, and mean and std.

    Raises:
        ConfigError: something is there already.
    """
    path = Path(path)
    if form == "bank":
        bank.save(path)
        return
    if not (bank.images and bank.images.kept):
        bank = bank.synthetic
    if path.exists():
        raise ConfigError(f"bank {path}: exists already; choose another place or remove it")
    make_folder(path.parent)
    write: dict[str, Callable[[SampleBank, Path], None]] = {
        "npz": _write_npz,
        "imagefolder": _write_folder,
        "safetensors": _write_safetensors,
    }
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        with naming(path):
            write[form](bank, partial / path.name)
            sync_tree(partial / path.name)
            os.replace(partial / path.name, path)
            sync_directory(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _facts(bank: SampleBank) -> dict[str, str]:
    spec = bank.input_spec
    return {
        "made_by": "qimera",
        "teacher": bank.teacher_hash,
        "pixel_range": json.dumps(spec.pixel_range),
        "mean": json.dumps(spec.mean),
        "std": json.dumps(spec.std),
        "num_held_out": str(bank.settings.num_held_out),
        "num_images": str(bank.num_images),
    }


def _write_npz(bank: SampleBank, path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(
            file,
            images=bank.pixels.permute(0, 2, 3, 1).numpy(),
            labels=bank.soft_labels.argmax(1).numpy(),
            soft_labels=bank.soft_labels.numpy(),
            logits=bank.logits.numpy(),
            facts=np.array(json.dumps(_facts(bank))),
        )


def _write_safetensors(bank: SampleBank, path: Path) -> None:
    tensors = {"pixels": bank.pixels, "soft_labels": bank.soft_labels, "logits": bank.logits}
    save_tensors(tensors, path, _facts(bank))


def _write_folder(bank: SampleBank, path: Path) -> None:
    channels = bank.pixels.shape[1]
    labels, digits = bank.soft_labels.argmax(1).tolist(), len(str(bank.soft_labels.shape[1] - 1))
    for number in range(bank.soft_labels.shape[1]):  # also those of classes without samples, or numbers would shift
        (path / f"{number:0{digits}}").mkdir(parents=True)
    with (path / "soft_labels.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", *range(bank.soft_labels.shape[1])])
        for index, (image, label) in enumerate(zip(bank.pixels, labels, strict=True)):
            name = f"{label:0{digits}}/{index:06}.png"
            array = image.permute(1, 2, 0).numpy()
            Image.fromarray(array[:, :, 0] if channels == 1 else array, IMAGE_MODES[channels]).save(path / name)
            table.writerow([name, *(f"{share:.6g}" for share in bank.soft_labels[index].tolist())])
    (path / "facts.json").write_text(json.dumps(_facts(bank), indent=2) + "\n", encoding="utf-8")
