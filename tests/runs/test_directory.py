import json
import shutil
import threading
from pathlib import Path

import pytest

from qimera.assessment.estimation import Estimate
from qimera.config.bits import parse_layer_bits
from qimera.config.input_spec import InputSpec
from qimera.config.run_settings import RunSettings
from qimera.config.settings import DistillationSettings, QuantizationSettings, SynthesisSettings
from qimera.errors import ConfigError
from qimera.machine.files import replacing
from qimera.machine.progress import Progress, silent
from qimera.report.summary import Summary, readable_bytes
from qimera.runs.directory import RunDirectory, refuse_other_content

SPEC = InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.25,))


def settings(**changes: object) -> RunSettings:
    values = {
        "model": "toy.py:build",
        "recipe": "fast",
        "input": SPEC,
        "synthesis": SynthesisSettings(),
        "quantization": QuantizationSettings(),
        "distillation": DistillationSettings(),
    }
    return RunSettings(**{**values, **changes})


def summary() -> Summary:
    return Summary(
        model="toy.py:build",
        teacher_hash="0123456789abcdef",
        num_classes=3,
        bits="w4a4",
        scheme="hardware",
        layer_bits="",
        recipe="fast",
        seed=0,
        num_samples=16,
        num_steps=3,
        num_held_out=8,
        estimate=Estimate(drop=1.3, low=0.6, high=2.4, agreement=93.75, num_samples=8),
        teacher_bytes=1_600_000,
        student_bytes=200_000,
        bank_seconds=None,
        student_seconds=61.2,
        finished="2026-01-01T00:00:00+00:00",
        machine="x86_64, 1 threads",
        versions={"torch": "2.13.0"},
    )


def files(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


# --- starting and taking up -------------------------------------------------------------------------------------------


def test_a_run_starts_with_its_settings_alone(tmp_path: Path) -> None:
    run = RunDirectory.start(tmp_path / "some" / "run", settings(seed=3))
    assert files(run.path) == ["settings.json"]
    assert RunSettings.load(run.path / "settings.json") == settings(seed=3)
    assert not run.is_finished


def test_an_empty_directory_may_become_a_run(tmp_path: Path) -> None:
    assert files(RunDirectory.start(tmp_path, settings()).path) == ["settings.json"]


def test_the_same_settings_take_up_the_run_that_is_there(tmp_path: Path) -> None:
    RunDirectory.start(tmp_path, settings()).finish(summary())
    assert RunDirectory.start(tmp_path, settings()).is_finished
    assert RunDirectory.open(tmp_path).summary() == summary()


def test_other_settings_are_refused_with_the_settings_that_differ(tmp_path: Path) -> None:
    RunDirectory.start(tmp_path, settings())
    other = settings(seed=1, quantization=QuantizationSettings(weight_bits=3))
    with pytest.raises(ConfigError, match=r"seed: 0 there, 1 now; quantization\.weight_bits: 4 there, 3 now"):
        RunDirectory.start(tmp_path, other)
    assert RunSettings.load(tmp_path / "settings.json") == settings()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": SPEC.replace(shape=(1, 8, 9))}, r"\(input\.shape: 1,8,8 there, 1,8,9 now\)"),
        (
            {"quantization": QuantizationSettings(layer_bits=parse_layer_bits("conv=8"))},
            r"\(quantization\.layer_bits: '' there, 'conv=w8a8' now\)",
        ),
        (
            {"distillation": DistillationSettings(equalize=False)},
            r"\(distillation\.equalize: true there, false now\)",
        ),
        (
            {"recipe": "fast,ptq", "alternatives": (DistillationSettings(num_steps=7),)},
            r"\(recipe: 'fast' there, 'fast,ptq' now; alternatives\.0\.num_steps: none there, 7 now; .* more\)",
        ),
    ],
)
def test_settings_that_differ_are_spelled_as_on_the_command_line(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    RunDirectory.start(tmp_path / "run", settings())
    with pytest.raises(ConfigError, match=message):
        RunDirectory.start(tmp_path / "run", settings(**changes))
    RunDirectory.start(tmp_path / "other", settings(**changes))
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        RunDirectory.start(tmp_path / "other", settings())


def test_a_long_list_of_differences_is_cut(tmp_path: Path) -> None:
    RunDirectory.start(tmp_path, settings())
    distillation = DistillationSettings(num_steps=1, batch_size=1, optimizer="sgd", ce_weight=1, flip=False)
    with pytest.raises(ConfigError, match="and 1 more"):
        RunDirectory.start(tmp_path, settings(distillation=distillation))


def test_a_directory_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        RunDirectory.start(tmp_path, settings())
    assert files(tmp_path) == ["thesis.tex"]


def test_a_file_is_refused_as_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="is a file"):
        refuse_other_content(tmp_path / "run")


def test_opening_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run"):
        RunDirectory.open(tmp_path)
    RunDirectory.start(tmp_path, settings())
    with pytest.raises(ConfigError, match="interrupted"):
        RunDirectory.open(tmp_path)


def test_a_damaged_summary_is_refused_with_its_name(tmp_path: Path) -> None:
    run = RunDirectory.start(tmp_path, settings())
    run.finish(summary())
    (tmp_path / "summary.json").write_text('{"model": ')
    with pytest.raises(ConfigError, match=r"summary\.json"):
        run.summary()


# --- metrics ----------------------------------------------------------------------------------------------------------


def record(run: RunDirectory, part: str, *steps: int) -> None:
    with run.metrics.recording(part, silent) as callback:  # type: ignore[arg-type]
        for step in steps:
            callback(Progress(f"{part} stage", step, 10, {"loss": 1 / step}))


def recorded(run: RunDirectory) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in run.metrics.path.read_text().splitlines()]
    return [(line["part"], line["step"]) for line in lines]


def test_every_step_is_one_line_with_its_metrics(tmp_path: Path) -> None:
    run = RunDirectory.start(tmp_path, settings())
    seen: list[Progress] = []
    with run.metrics.recording("student", seen.append) as callback:
        callback(Progress("distillation", 10, 600, {"kl": 0.25}))
        (line,) = run.metrics.path.read_text().splitlines()  # written at once, not when the stage ends
    values = json.loads(line)
    assert values.pop("seconds") >= 0
    assert values == {"part": "student", "stage": "distillation", "step": 10, "total": 600, "kl": 0.25}
    assert seen == [Progress("distillation", 10, 600, {"kl": 0.25})]


def test_the_seconds_of_a_part_are_those_of_its_last_step(tmp_path: Path) -> None:
    run = RunDirectory.start(tmp_path, settings())
    record(run, "bank", 1, 2)
    last = json.loads(run.metrics.path.read_text().splitlines()[-1])
    assert run.seconds("bank") == last["seconds"]
    assert run.seconds("student") is None


def test_a_stage_that_goes_on_takes_the_place_of_the_steps_that_it_does_again(tmp_path: Path) -> None:
    run = RunDirectory.start(tmp_path, settings())
    record(run, "bank", 1, 2)
    record(run, "student", 1, 2, 3, 4)
    with run.metrics.path.open("a") as file:
        file.write('{"part": "student", "stage": "student stage", "st')  # the process was killed here
    again = RunDirectory.start(tmp_path, settings())
    assert len(again.metrics.lines()) == 6
    record(again, "student", 3, 4, 5)
    assert recorded(again) == [("bank", 1), ("bank", 2), *(("student", step) for step in range(1, 6))]


def test_the_seconds_before_an_interruption_count(tmp_path: Path) -> None:
    run = RunDirectory.start(tmp_path, settings())
    run.metrics.path.write_text(json.dumps({"part": "bank", "stage": "s", "step": 1, "total": 2, "seconds": 100.0}))
    with run.metrics.path.open("a") as file:
        file.write("\n")
    record(run, "bank", 2)
    assert 100 <= (run.seconds("bank") or 0) < 110


def test_the_seconds_of_several_students_are_added(tmp_path: Path) -> None:
    run = RunDirectory.start(tmp_path, settings())
    for part, seconds in (("student fast", 1.0), ("student fast", 2.0), ("student ptq", 5.0), ("bank", 50.0)):
        line = {"part": part, "stage": "s", "step": 1, "total": 2, "seconds": seconds}
        with run.metrics.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    assert run.seconds("student") == 7.0


@pytest.mark.parametrize("damage", ["{}", "[1]", "null", '{"part": 1', "\x00\x00", '{"part": "bank", "step": 3}'])
def test_a_damaged_line_of_the_metrics_is_left_out(tmp_path: Path, damage: str) -> None:
    run = RunDirectory.start(tmp_path, settings())
    record(run, "bank", 1)
    with run.metrics.path.open("a") as file:
        file.write(f"{damage}\n")
    record(run, "bank", 2)
    assert recorded(run) == [("bank", 1), ("bank", 2)]


def test_a_finished_run_keeps_all_its_metrics(tmp_path: Path) -> None:
    run = RunDirectory.start(tmp_path, settings())
    record(run, "bank", 1)
    record(run, "student", 1)
    run.finish(summary())
    assert recorded(RunDirectory.start(tmp_path, settings())) == [("bank", 1), ("student", 1)]


# --- files that are whole or absent -----------------------------------------------------------------------------------


def test_a_file_that_is_not_finished_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as temporary:
        temporary.write_text("new, but not \ud800")
    assert files(tmp_path) == ["student.safetensors"]
    assert path.read_text() == "old"


def test_a_finished_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert (files(tmp_path), path.read_text()) == (["summary.json"], "new")


def test_working_in_a_run_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    run = RunDirectory.start(tmp_path, settings())
    (tmp_path / ".student.partial-123.safetensors").touch()
    (tmp_path / ".bank.partial-123").mkdir()
    (tmp_path / ".bank.partial-123" / "samples-00000.safetensors").touch()
    with run.occupied():
        assert files(tmp_path) == ["settings.json"]


def test_a_run_in_which_another_is_at_work_is_refused_and_left_alone(tmp_path: Path) -> None:
    run, other = (RunDirectory.start(tmp_path, settings()) for _ in range(2))
    with run.occupied():
        (tmp_path / ".student.partial-123.safetensors").touch()
        with pytest.raises(ConfigError, match="another run is at work in it; wait for its end"), other.occupied():
            pass
        with pytest.raises(ConfigError, match="not finished, and a process is at work in it; wait for its end"):
            RunDirectory.open(tmp_path)
        assert files(tmp_path) == [".student.partial-123.safetensors", "settings.json"]
    with other.occupied():
        pass


# --- summary ----------------------------------------------------------------------------------------------------------


def test_the_summary_says_what_was_made_from_what(tmp_path: Path) -> None:
    run = RunDirectory.start(tmp_path, settings())
    run.finish(summary())
    text = run.text_file.read_text()
    assert text == summary().text()
    for fact in ("toy.py:build", "w4a4", "seed 0", "made earlier", "61 s", "200.0 kB instead of 1.60 MB"):
        assert fact in text
    assert "16 synthetic samples and 8 held out" in text
    assert "a drop of 1.3 points (0.6 to 2.4, 90 %), from 8 held-out synthetic samples" in text


def test_a_summary_from_before_there_were_held_out_samples_is_read(tmp_path: Path) -> None:
    values = json.loads(summary().model_dump_json())
    del values["estimate"], values["num_held_out"]
    (tmp_path / "summary.json").write_text(json.dumps({**values, "bank_agreement": 93.75}))
    text = Summary.load(tmp_path / "summary.json").text()
    assert "none; 93.8 % agreement on synthetic samples it was trained on" in text


@pytest.mark.parametrize(("num_bytes", "text"), [(999, "1.0 kB"), (41_304, "41.3 kB"), (46_800_000, "46.80 MB")])
def test_sizes_are_readable(num_bytes: int, text: str) -> None:
    assert readable_bytes(num_bytes) == text


def test_of_two_runs_that_begin_at_once_one_is_refused(tmp_path: Path) -> None:
    """Both find an empty directory; their settings differ."""
    both = [settings(), settings(seed=7)]
    refused: list[str] = []

    def begin(number: int) -> None:
        try:
            RunDirectory.start(tmp_path / "run", both[number])
        except ConfigError as error:
            refused.append(str(error))

    for _ in range(20):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        threads = [threading.Thread(target=begin, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(refused) == 20
    assert all("holds a run with other settings (seed" in message for message in refused)
