import json
import math
from pathlib import Path

import pytest
import torch

from qimera.assessment.estimation import estimate_drop, estimate_on_held_out
from qimera.config.run_settings import RunSettings
from qimera.config.settings import DirectSettings, DistillationSettings, QuantizationSettings, SynthesisSettings
from qimera.errors import ConfigError
from qimera.machine.progress import Progress, silent
from qimera.runs.directory import RunDirectory
from qimera.runs.execution import carry_out, check_run, load_student
from qimera.synthesis.bank import SampleBank
from qimera.teacher.sources import EMBEDDED_MODELS
from qimera.teacher.teacher import Teacher
from tests.command_line import tiny_settings

GOOD = DistillationSettings(num_steps=0, start="compensated")
BAD = DistillationSettings(num_steps=4, batch_size=8, weight_learning_rate=5.0)
WAYS = {"good": GOOD, "bad": BAD}


def with_bank(bank: Path, **changes: object) -> RunSettings:
    """Return settings of a run that learns from a bank made earlier."""
    return tiny_settings("mnist_cnn", input=EMBEDDED_MODELS["mnist_cnn"].input_spec, bank=str(bank), **changes)


def finished(path: Path, teacher: Teacher, settings: RunSettings) -> RunDirectory:
    bank = SampleBank.load(Path(settings.bank), teacher) if settings.bank else None
    check_run(settings, teacher, bank)
    run = RunDirectory.start(path, settings)
    carry_out(run, teacher, bank, silent)
    return run


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, digits_teacher: Teacher, digits_bank: Path
) -> dict[str, RunDirectory]:
    """Runs with a recipe each, the good and the bad."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: finished(folder / name, digits_teacher, with_bank(digits_bank, distillation=settings))
        for name, settings in WAYS.items()
    }


@pytest.mark.parametrize("ways", [("good", "bad"), ("bad", "good")])
def test_of_several_recipes_the_student_with_the_lowest_estimated_drop_is_kept(
    tmp_path: Path, digits_teacher: Teacher, digits_bank: Path, alone: dict[str, RunDirectory], ways: tuple[str, str]
) -> None:
    first, second = (WAYS[way] for way in ways)
    settings = with_bank(digits_bank, recipe=",".join(ways), distillation=first, alternatives=(second,))
    both = finished(tmp_path / "both", digits_teacher, settings)
    assert both.summary().recipe == "good"
    assert both.summary().num_steps == 0
    kept, expected = (load_student(run)[0].module.state_dict() for run in (both, alone["good"]))
    assert all(torch.equal(kept[name], expected[name]) for name in expected)


def test_the_good_recipe_is_the_one_of_the_lower_estimated_drop(
    digits_teacher: Teacher, digits_bank: Path, alone: dict[str, RunDirectory]
) -> None:
    bank = SampleBank.load(digits_bank, digits_teacher)
    good, bad = (estimate_drop(load_student(alone[name])[0], digits_teacher, bank).drop for name in ("good", "bad"))
    assert good < bad


def test_a_start_that_the_scheme_has_not_is_refused_before_anything_is_made(digits_teacher: Teacher) -> None:
    settings = tiny_settings(
        "mnist_cnn", quantization=QuantizationSettings(scheme="paper"), alternatives=(GOOD,), recipe="fast,ptq"
    )
    with pytest.raises(ConfigError, match="start: compensated integers are for scheme hardware"):
        check_run(settings, digits_teacher, None)


def test_a_choice_that_was_interrupted_comes_to_the_same_student(tmp_path: Path, small_teacher: Teacher) -> None:
    synthesis = SynthesisSettings(num_optimized=16, num_held_out=8, direct=DirectSettings(num_steps=2, batch_size=16))
    settings = tiny_settings(recipe="a,b", synthesis=synthesis, distillation=GOOD, alternatives=(BAD,))
    whole = finished(tmp_path / "whole", small_teacher, settings)
    run = RunDirectory.start(tmp_path / "run", settings)

    def interrupt(progress: Progress) -> None:
        if progress.stage == "distillation":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(run, small_teacher, None, interrupt)
    again = finished(run.path, small_teacher, settings)
    one, two = (load_student(each)[0].module.state_dict() for each in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "a,b", "alternatives": (GOOD,)},
        {"distillation": DistillationSettings(num_steps=2, select_every=1)},
    ],
)
def test_a_choice_without_held_out_samples_is_refused_before_the_run(
    small_teacher: Teacher, changes: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match="holds no held-out samples to judge by"):
        check_run(tiny_settings(**changes), small_teacher, None)


def test_the_training_of_a_generator_that_is_not_there_is_refused_before_the_run(small_teacher: Teacher) -> None:
    settings = tiny_settings(distillation=DistillationSettings(num_steps=2, generator_steps_per_step=1))
    with pytest.raises(ConfigError, match="generator_steps_per_step: 1, but the bank of these settings has no"):
        check_run(settings, small_teacher, None)


def test_the_summary_states_the_estimate_of_the_student_that_was_kept(alone: dict[str, RunDirectory]) -> None:
    summary = alone["good"].summary()
    assert (summary.num_samples, summary.num_held_out) == (48, 16)
    estimate = summary.estimate
    assert estimate is not None
    assert 0 < estimate.num_samples <= 16
    assert estimate.low <= estimate.drop <= estimate.high
    assert "48 synthetic samples and 16 held out" in summary.text()
    assert f"a drop of {estimate.drop:.1f} points" in summary.text()
    assert f"90 %), from {estimate.num_samples} held-out synthetic samples" in summary.text()


def test_without_held_out_samples_the_summary_has_no_estimate(tmp_path: Path, small_teacher: Teacher) -> None:
    summary = finished(tmp_path / "run", small_teacher, tiny_settings()).summary()
    assert summary.estimate is None
    assert "none without held-out samples" in summary.text()
    assert "none, because of the warning above" in summary.replace(has_batch_norms=False).text()


def test_samples_that_do_not_resemble_the_training_data_get_no_estimate_and_the_summary_says_why_first(
    tmp_path: Path, small_teacher: Teacher
) -> None:
    synthesis = SynthesisSettings(num_optimized=16, num_held_out=8, direct=DirectSettings(num_steps=1, batch_size=16))
    run = finished(tmp_path / "run", small_teacher, tiny_settings(synthesis=synthesis, distillation=GOOD))
    summary = run.summary()
    assert summary.estimate is None
    assert summary.warnings[0].startswith("statistics: samples differ from the training data")
    assert summary.text().startswith("warning    statistics: samples differ")
    assert "estimate   none, because of the warning above" in summary.text()
    assert json.loads((run.path / "summary.json").read_text())["warnings"] == list(summary.warnings)
    student, bank = load_student(run)[0], SampleBank.load(run.bank_directory, small_teacher)
    estimate = estimate_drop(student, small_teacher, bank)
    assert all(math.isnan(value) for value in (estimate.drop, estimate.low, estimate.high))
    assert estimate.doubts == summary.warnings[: len(estimate.doubts)]
    assert estimate.text().startswith("none, because the samples say nothing about real images: statistics")
    assert estimate_on_held_out(student, small_teacher, bank).num_samples > 0  # enough to compare students by
