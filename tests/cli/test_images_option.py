"""``--images``: what runs and banks make of a user's own images, and where these do not go."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import Result

from qimera.cli.arguments import ModelOptions, RunOptions
from qimera.cli.options import read_settings
from qimera.cli.results import Synthesis
from qimera.cli.tables import bank_facts
from qimera.config.run_settings import RunSettings
from qimera.errors import ConfigError
from qimera.report import figures
from qimera.report.summary import Summary
from qimera.runs.directory import RunDirectory
from qimera.runs.execution import carry_out, load_bank
from qimera.runs.loading import load
from qimera.synthesis.bank import check_bank
from tests.command_line import INPUT, SMALL, qimera, said

FEW = ("--set", "direct.num_steps=2", "--set", "synthesis.num_optimized=16", "--set", "synthesis.num_held_out=8")


def write_images(path: Path, count: int, seed: int = 0) -> Path:
    np.save(path, np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("own") / "images.npy", 12)


def quantize(output: Path, *more: object) -> Result:
    return qimera("quantize", SMALL, *INPUT, "--recipe", "ptq", *FEW, "--output", output, *more)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A finished run with a dozen images of the user's, which it did not keep."""
    path = tmp_path_factory.mktemp("finished") / "run"
    result = quantize(path, "--images", images)
    assert result.exit_code == 0, result.stderr
    return path


def holds_any(folder: Path, images: Path) -> bool:
    """Whether the pixels of an image are in any file below a folder, as they are or in a tensor."""
    pixels = np.load(images)
    content = b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
    return any(image.tobytes() in content for image in pixels)


def test_summary_report_and_table_say_that_the_model_was_not_made_from_nothing(run: Path) -> None:
    summary = Summary.load(run / "summary.json")
    assert (summary.num_samples, summary.num_held_out, summary.num_images) == (16, 8, 12)
    assert "12 unlabelled images of yours, so this model was not made without data" in summary.text()
    page = re.sub(r"\s+", " ", (run / "report.html").read_text())
    assert "Quantized with 12 unlabelled images by qimera" in page
    assert "not made without data" in page
    assert "Quantized without data" not in page
    compared = qimera("compare", run, "--json")
    assert json.loads(compared.stdout)["runs"][0]["num_images"] == 12
    assert "ptq, 12 images" in qimera("compare", run).stdout


def test_a_run_remembers_the_hash_of_images_and_neither_them_nor_their_place(run: Path, images: Path) -> None:
    settings = RunSettings.load(run / "settings.json")
    assert settings.images is not None
    assert (settings.images.count, settings.images.kept) == (12, False)
    assert str(images.parent) not in (run / "settings.json").read_text()
    assert not holds_any(run, images)
    assert len(load_file(run / "bank" / "samples-00000.safetensors")["pixels"]) == 24


def test_a_finished_run_is_exported_evaluated_and_reported_without_the_images(run: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "test.npz", images=np.zeros((4, 8, 8, 1), np.uint8), labels=np.arange(4) % 3)
    for command in (
        ("export", run, "--format", "pt2", "--output", tmp_path / "student.pt2"),
        ("evaluate", run, "--data", tmp_path / "test.npz"),
        ("report", run),
        ("quantize", "--settings", run / "settings.json", "--output", run),
    ):
        result = qimera(*command)
        assert result.exit_code == 0, result.stderr


def test_the_bank_of_a_loaded_run_asks_for_the_images_before_another_student_learns_from_it(run: Path) -> None:
    loaded = load(run)
    with pytest.raises(ConfigError, match="made with 12 images of yours"):
        check_bank(loaded.bank, loaded.teacher)


def test_a_run_continued_with_other_images_is_refused(run: Path, tmp_path: Path) -> None:
    other = quantize(run, "--images", write_images(tmp_path / "other.npy", 12, seed=1))
    assert other.exit_code == 2
    assert re.search(r"holds a run that learns from 12 images of yours \(SHA-256 \w+\), given 12 images", said(other))
    none = quantize(run)
    assert none.exit_code == 2
    assert "given no images of yours; give the same --images, or choose another --output" in said(none)


def test_an_interrupted_run_asks_for_its_images_and_continues_with_them(
    run: Path, tmp_path: Path, images: Path
) -> None:
    def interrupt(progress: object) -> None:
        if getattr(progress, "stage", "") == "rounding":
            raise KeyboardInterrupt

    path = tmp_path / "run"
    options = RunOptions(images=images)
    read = read_settings(run / "settings.json", ModelOptions(), options)
    with pytest.raises(KeyboardInterrupt):
        carry_out(RunDirectory.start(path, read.settings), read.teacher, None, interrupt, images=read.images)
    again = qimera("quantize", "--settings", path / "settings.json", "--output", path)
    assert again.exit_code == 2
    assert "--images: the run learns from 12 images of yours" in said(again)
    finished = qimera("quantize", "--settings", path / "settings.json", "--output", path, "--images", images)
    assert finished.exit_code == 0, finished.stderr
    one, two = (load_file(each / "student.safetensors") for each in (run, path))
    assert all(bool((one[name] == two[name]).all()) for name in one)


def test_settings_are_not_started_with_images_that_they_do_not_remember(run: Path, tmp_path: Path) -> None:
    other = write_images(tmp_path / "other.npy", 3)
    result = qimera("quantize", "--settings", run / "settings.json", "--output", tmp_path / "run", "--images", other)
    assert result.exit_code == 2
    assert re.search(r"--images: .* remembers 12 images of yours .* given 3 images of yours", said(result))


def test_images_that_are_kept_are_in_the_bank_and_not_on_the_page(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, shown, draw = tmp_path / "run", [], figures.picture
    monkeypatch.setattr(figures, "picture", lambda rows: shown.append(rows) or draw(rows))
    result = quantize(path, "--images", images, "--keep-images", "--set", "synthesis.num_held_out=0")
    assert result.exit_code == 0, result.stderr
    assert holds_any(path / "bank", images)
    own = {image.tobytes() for image in np.load(images)}
    drawn = [image.permute(1, 2, 0).contiguous().numpy().tobytes() for rows in shown for image in rows.flatten(0, 1)]
    assert drawn
    assert not own & set(drawn)
    assert "This page does not show them" in re.sub(r"\s+", " ", (path / "report.html").read_text())
    loaded = load(path)
    assert (loaded.bank.num_images, loaded.bank.num_training) == (12, 28)
    again = qimera("quantize", "--settings", path / "settings.json", "--output", tmp_path / "again")
    assert again.exit_code == 2  # a bank of its own is to be made, with images that another bank holds


@pytest.mark.parametrize("held_out", [8, 0])
def test_recipe_images_makes_a_student_from_images_alone(tmp_path: Path, images: Path, held_out: int) -> None:
    path = tmp_path / "run"
    few = ("--set", "direct.num_steps=2", "--set", f"synthesis.num_held_out={held_out}")
    how = ("--recipe", "images", "--images", images, *few, "--output", path)
    result = qimera("quantize", SMALL, *INPUT, *how)
    assert result.exit_code == 0, result.stderr
    summary = Summary.load(path / "summary.json")
    assert (summary.num_samples, summary.num_images, summary.num_held_out) == (0, 12, held_out)
    page = re.sub(r"\s+", " ", (path / "report.html").read_text())
    assert "They joined the synthetic samples" not in page
    if held_out:
        assert "The student was made only from them; synthetic samples judge it." in page
    else:
        assert "no synthetic samples" in summary.text()
        assert "the model was made only from images of yours" in page
        assert "No samples were synthesised" in page
        assert "There are no samples to look at the layers with" in page
    exported = qimera("export", path, "--format", "pt2", "--json")
    assert exported.exit_code == 0, exported.stderr
    assert json.loads(exported.stdout)["num_samples"] == (held_out or 32)  # of noise, where there are none


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "images"), "both are 0, and there are no images of yours"),
        (("--keep-images",), "--keep-images: there are no images to keep; add --images"),
        (("--images", "nowhere"), "nowhere: no such file or folder; give a folder of images"),
    ],
)
def test_options_that_say_nothing_are_refused_before_a_run_is_begun(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = qimera("quantize", SMALL, *INPUT, "--output", tmp_path / "run", *options)
    assert result.exit_code == 2
    assert message in said(result)
    assert not (tmp_path / "run").exists()


def test_recipe_images_is_refused_where_there_are_samples_too(tmp_path: Path, run: Path) -> None:
    for how in (("--recipe", "images", "--bank", run / "bank"), ("--recipe", "ptq,images")):
        result = qimera("quantize", SMALL, *INPUT, *how, "--output", tmp_path / "run")
        assert result.exit_code == 2, how
        assert "--recipe: images makes a student only from your images, but there are" in said(result)
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_students_of_several_widths_learn_from_the_same_images(tmp_path: Path, images: Path) -> None:
    result = quantize(tmp_path / "runs", "--images", images, "--bits", "w8a8,w4a4")
    assert result.exit_code == 0, result.stderr
    for bits in ("w8a8", "w4a4"):
        run = RunDirectory.open(tmp_path / "runs" / bits)
        assert run.summary().num_images == 12
    assert load_bank(run, load(run.path).teacher).num_images == 0
    assert not holds_any(tmp_path / "runs", images)


# --- qimera synthesize ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_bank_made_earlier_remembers_or_holds_images(tmp_path: Path, images: Path, kept: bool) -> None:
    bank, keep = tmp_path / "bank", ("--keep-images",) if kept else ()
    how = ("--recipe", "images", "--images", images, *keep, "--json")
    made = qimera("synthesize", SMALL, *INPUT, *how, "--output", bank)
    assert made.exit_code == 0, made.stderr
    values = json.loads(made.stdout)
    assert (values["num_samples"], values["num_images"], values["holds_images"]) == (0, 12, kept)
    assert holds_any(bank, images) == kept
    alone = qimera("quantize", SMALL, *INPUT, "--recipe", "ptq", "--bank", bank, "--output", tmp_path / "alone")
    assert alone.exit_code == (0 if kept else 2), alone.stderr
    if not kept:
        assert "give them again (--images" in said(alone)
        both = ("--bank", bank, "--images", images)
        result = qimera("quantize", SMALL, *INPUT, "--recipe", "ptq", *both, "--output", tmp_path / "both")
        assert result.exit_code == 0, result.stderr
        refused = qimera("quantize", SMALL, *INPUT, *both, "--keep-images", "--output", tmp_path / "no")
        assert "is made already; leave it out, or give qimera synthesize --bank" in said(refused)


@pytest.mark.parametrize(("holds", "where"), [(False, "of which it holds only the hash"), (True, "which it holds")])
def test_a_bank_says_what_became_of_the_images(holds: bool, where: str) -> None:
    facts = {
        "bank": "bank",
        "format": "bank",
        "model": "m",
        "teacher": "ab",
        "num_samples": 3,
        "num_held_out": 0,
        "hash": "cd",
    }
    assert f"with 1 image of yours, {where}\n" in bank_facts(Synthesis(**facts, num_images=1, holds_images=holds))
    assert "yours" not in bank_facts(Synthesis(**facts, num_images=0, holds_images=False))
