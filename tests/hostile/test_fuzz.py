"""Files that are damaged in every way that comes to mind: each is read, or refused with a message that names it."""

import json
import os
import random
import shutil
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from qimera.assessment.data import load_labelled_images
from qimera.assessment.unlabelled import load_images
from qimera.config.run_settings import RunSettings
from qimera.config.settings import DistillationSettings, QuantizationSettings
from qimera.errors import QimeraError
from qimera.machine.checkpoint import Checkpoints
from qimera.machine.metrics import Metrics
from qimera.mixed_precision.allocation import Allocation
from qimera.pipeline import quantize
from qimera.report.content import Measured, Report
from qimera.report.summary import Summary
from qimera.runs.directory import RunDirectory
from qimera.student.student import Student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.state_dicts import load_weights_
from qimera.teacher.teacher import Teacher
from tests.command_line import tiny_settings
from tests.networks import NUM_CLASSES, SPEC, TinyNet
from tests.runs.test_directory import summary

NUM_CASES = {"default": 150, "slow": 10_000}


@dataclass(frozen=True)
class Subject:
    """Something that qimera reads."""

    files: list[str]
    """Of the folder, those that are damaged."""
    read: Callable[[Path], object]
    """Reads what lies in a folder."""
    share: float = 1.0
    """Of cases, against the others: some take long to read."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory, teacher: Teacher, bank: SampleBank) -> Path:
    """One whole file of every kind."""
    folder = tmp_path_factory.mktemp("originals")
    bank.save(folder / "bank")
    tiny_settings().save(folder / "settings.json")
    summary().save(folder / "summary.json")
    line = {"part": "bank", "stage": "direct", "step": 3, "total": 9, "seconds": 1.5, "direct_ce": 0.5}
    (folder / "metrics.jsonl").write_text(f"{json.dumps(line)}\n" * 5)
    measured = Measured(data="a", num_images=3, student_top1=50.0, teacher_top1=60.0, agreement=70.0)
    measured.save(folder / "evaluation.json")
    Checkpoints(folder, "fuzz").of("checkpoint").save({"step": 3, "state": {"a": torch.zeros(50)}})
    student = quantize(teacher, bank, settings=DistillationSettings(num_steps=0))
    student.save_state(folder / "student.safetensors")
    student.save(folder / "whole_student.safetensors")
    teacher.save(folder / "teacher.safetensors")
    torch.save(TinyNet().state_dict(), folder / "weights.pt")
    save_file(TinyNet().state_dict(), folder / "weights.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (6, *SPEC.shape[1:], SPEC.shape[0]), np.uint8)
    np.savez_compressed(folder / "test.npz", images=pixels, labels=np.arange(6) % NUM_CLASSES)
    np.save(folder / "images.npy", pixels)
    for number in range(2):
        (folder / "images" / str(number)).mkdir(parents=True)
        Image.fromarray(pixels[number]).save(folder / "images" / str(number) / "a.png")
    return folder


def subjects(teacher: Teacher) -> dict[str, Subject]:
    def images(path: Path) -> None:
        list(load_labelled_images(path, SPEC, NUM_CLASSES).batches(4))

    shards = ["bank/manifest.json", "bank/samples-00000.safetensors", "bank/generator.safetensors"]
    return {
        "bank": Subject(shards, lambda folder: SampleBank.load(folder / "bank", teacher), 2.0),
        "settings": Subject(["settings.json"], lambda folder: RunSettings.load(folder / "settings.json")),
        "run": Subject(["settings.json", "summary.json"], lambda folder: RunDirectory.open(folder).summary()),
        "summary": Subject(["summary.json"], lambda folder: Summary.load(folder / "summary.json")),
        "evaluation": Subject(["evaluation.json"], lambda folder: Measured.load(folder / "evaluation.json")),
        "report": Subject(["summary.json"], lambda folder: Report.load(folder / "summary.json"), 0.3),
        "allocation": Subject(["summary.json"], lambda folder: Allocation.load(folder / "summary.json"), 0.3),
        "metrics": Subject(["metrics.jsonl"], lambda folder: Metrics(folder / "metrics.jsonl").lines()),
        "checkpoint": Subject(["checkpoint.pt"], lambda folder: Checkpoints(folder, "fuzz").of("checkpoint").load()),
        "student": Subject(
            ["student.safetensors"],
            lambda folder: Student.load_state(folder / "student.safetensors", teacher, QuantizationSettings()),
            0.1,
        ),
        "whole student": Subject(
            ["whole_student.safetensors"], lambda folder: Student.load(folder / "whole_student.safetensors"), 0.1
        ),
        "teacher": Subject(
            ["teacher.safetensors"], lambda folder: Teacher.load(folder / "teacher.safetensors", SPEC), 0.5
        ),
        "weights.pt": Subject(["weights.pt"], lambda folder: load_weights_(TinyNet(), folder / "weights.pt")),
        "weights.safetensors": Subject(
            ["weights.safetensors"], lambda folder: load_weights_(TinyNet(), folder / "weights.safetensors")
        ),
        "npz": Subject(["test.npz"], lambda folder: images(folder / "test.npz"), 2.0),
        "images": Subject(["images/0/a.png", "images/1/a.png"], lambda folder: images(folder / "images")),
        "own npz": Subject(["test.npz"], lambda folder: load_images(folder / "test.npz", SPEC)),
        "own npy": Subject(["images.npy"], lambda folder: load_images(folder / "images.npy", SPEC)),
        "own images": Subject(["images/0/a.png"], lambda folder: load_images(folder / "images", SPEC)),
    }


NUMBERS = [-1, 0, 2**63, 1e308, float("nan")]
STRANGE = [None, True, *NUMBERS, "", "x" * 10_000, "../../outside", "/etc/passwd", [], {}, [[]]]


def damage(path: Path, chance: random.Random) -> str:
    """Damage a file in one way, and say how."""
    content = path.read_bytes()
    ways = ["cut", "flip", "insert", "zeros", "empty", "swap", "directory", "link", "missing"]
    ways += ["value", "value", "key", "nested"] if path.suffix == ".json" else []
    ways += ["length", "length"] if path.suffix == ".safetensors" else []
    ways += ["member", "bomb"] if path.suffix in (".npz", ".pt") else []
    way = chance.choice(ways)
    place = chance.randrange(len(content) + 1)
    match way:
        case "cut":
            path.write_bytes(content[:place])
        case "flip":
            changed = bytearray(content)
            for _ in range(chance.choice([1, 1, 8, 100])):
                changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
            path.write_bytes(changed)
        case "insert":
            path.write_bytes(content[:place] + chance.randbytes(chance.choice([1, 8, 1000])) + content[place:])
        case "zeros":
            path.write_bytes(content[:place] + bytes(min(64, len(content) - place)) + content[place + 64 :])
        case "empty":
            path.write_bytes(b"")
        case "swap":
            path.write_bytes(content[place:] + content[:place])
        case "directory":
            path.unlink()
            path.mkdir()
        case "link":
            path.unlink()
            path.symlink_to(chance.choice(["/dev/null", "nowhere", path.name]))
        case "missing":
            path.unlink()
        case "length":  # of the header of safetensors
            path.write_bytes(chance.choice([2**63, 2**31, 0, len(content) * 2]).to_bytes(8, "little") + content[8:])
        case "value" | "key" | "nested":
            _change_json(path, way, chance)
        case "member" | "bomb":
            _change_archive(path, way, chance)
    return way


def _change_json(path: Path, way: str, chance: random.Random) -> None:
    value = json.loads(path.read_text())
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = chance.choice(keys)
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.3:
            break
        place = inner
    if way == "value":
        place[key] = chance.choice(STRANGE)
    elif way == "key":
        del place[key]
    path.write_text("[" * 5000 + "]" * 5000 if way == "nested" else json.dumps(value))


def _change_archive(path: Path, way: str, chance: random.Random) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = chance.choice(list(members))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for each, content in members.items():
            if each != name:
                archive.writestr(each, content)
            elif way == "member":
                archive.writestr(f"../{each}", content)
            else:
                archive.writestr(each, bytes(2**26))


def listing(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


OF_ANOTHER_KIND = {"report", "allocation"}
"""Subjects that are given whole files of another kind."""


def test_whole_files_are_read(originals: Path, teacher: Teacher) -> None:
    for name, subject in subjects(teacher).items():
        if name not in OF_ANOTHER_KIND:
            subject.read(originals)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("amount", ["default", pytest.param("slow", marks=pytest.mark.slow)])
def test_damaged_files_are_refused_with_a_message(
    tmp_path: Path, originals: Path, teacher: Teacher, amount: str
) -> None:
    chance, found = random.Random(1), subjects(teacher)
    names = chance.choices(list(found), [subject.share for subject in found.values()], k=NUM_CASES[amount])
    folder, faults = tmp_path / "inside", []
    for number, name in enumerate(names):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(originals, folder)
        file = chance.choice(found[name].files)
        way = damage(folder / file, chance)
        before = listing(tmp_path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name].read(folder)
        except QimeraError as error:
            if not str(error).strip():
                faults.append((number, name, file, way, "no message"))
        except OSError as error:
            if error.filename is None:  # the command line shows an OSError by its file's name
                faults.append((number, name, file, way, repr(error)))
        except BaseException as error:
            faults.append((number, name, file, way, f"{type(error).__name__}: {str(error)[:200]}"))
        if listing(tmp_path) != before:
            faults.append((number, name, file, way, "left a file behind"))
    assert not faults, "\n".join(map(str, faults))
    assert os.listdir(tmp_path) == ["inside"]
