import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from qimera.cli.arguments import ModelOptions, RunOptions
from qimera.cli.console import ProgressDisplay
from qimera.cli.facts import inspection
from qimera.cli.options import read_settings
from qimera.cli.tables import layer_table
from qimera.config.input_spec import InputSpec
from qimera.config.run_settings import RunSettings
from qimera.errors import ConfigError
from qimera.machine.progress import Progress
from qimera.runs.comparison import comparison_table
from qimera.runs.directory import RunDirectory
from qimera.runs.execution import carry_out
from qimera.teacher.sources import load_model
from qimera.teacher.teacher import Teacher
from tests.command_line import INPUT, SMALL, qimera, said, tiny_settings, write_model_file

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"

FLOW = """
from torch import nn

class Flow(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 3))

    def forward(self, x):
        x = self.layers(x)
        if x.sum() > 0:
            x = 2 * x
        return x
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    return write_model_file(tmp_path)


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["ptq", pytest.param("fast", marks=pytest.mark.slow)])
def test_quantize_as_a_user_spells_it_makes_a_run_from_a_file_and_its_weights(
    tmp_path: Path, model_file: Path, recipe: str
) -> None:
    source = f"{model_file}:build"
    save_file(load_model(source).state_dict(), tmp_path / "toy.safetensors")
    options = (source, "--weights", tmp_path / "toy.safetensors", *INPUT)
    few = ("--set", "synthesis.num_optimized=16", "--set", "direct.num_steps=2")
    bank = qimera("synthesize", *options, "--recipe", recipe, *few, "--seed", 1, "--output", tmp_path / "bank")
    assert bank.exit_code == 0, bank.stderr
    assert "warning: " in bank.stderr
    assert "warning: " not in bank.stdout
    how = ("--bits", "w3a4", "--recipe", recipe, "--scheme", "hardware", "--target", "openvino", "--layer-bits", "4=8")
    run = qimera("quantize", *options, *how, "--bank", tmp_path / "bank", "--output", tmp_path / "run")
    assert run.exit_code == 0, run.stderr
    assert "w3a4, except 4=w8a8, scheme hardware, target openvino" in run.stdout
    settings = RunSettings.load(tmp_path / "run" / "settings.json")
    assert (settings.synthesis.num_optimized, settings.synthesis.direct.num_steps) == (16, 2)
    assert settings.quantization.bits_of("0") == (3, 4)
    assert settings.quantization.bits_of("4") == (8, 8)
    assert settings.quantization.target == "openvino"
    assert settings.model == source
    assert settings.bank == str(tmp_path / "bank")
    assert not (tmp_path / "run" / "bank").exists()


def test_quantize_prints_the_summary_alone_on_stdout(finished_run: Path) -> None:
    again = qimera("quantize", "--settings", finished_run / "settings.json", "--output", finished_run)
    assert again.exit_code == 0
    assert again.stdout == (finished_run / "summary.txt").read_text()
    assert "finished already" in again.stderr


def test_a_finished_run_is_shown_without_what_draws_reports(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "qimera.runs.reporting", None)  # an import of it fails
    again = qimera("quantize", "--settings", finished_run / "settings.json", "--output", finished_run)
    assert again.exit_code == 0, again.stderr


def test_the_settings_of_a_run_start_the_same_run_again(tmp_path: Path, finished_run: Path) -> None:
    other = qimera("quantize", "--settings", finished_run / "settings.json", "--output", tmp_path / "other")
    assert other.exit_code == 0, other.stderr
    assert (tmp_path / "other" / "settings.json").read_text() == (finished_run / "settings.json").read_text()
    assert_same_tensors(tmp_path / "other" / "student.safetensors", finished_run / "student.safetensors")


def test_a_run_that_was_interrupted_continues_with_its_bank_to_the_same_student(
    tmp_path: Path, finished_run: Path
) -> None:
    read = read_settings(finished_run / "settings.json", ModelOptions(), RunOptions())
    run = RunDirectory.start(tmp_path / "run", read.settings)
    with pytest.raises(KeyboardInterrupt):
        carry_out(run, read.teacher, read.bank, interrupt_training)
    assert not run.is_finished
    bank_written = (run.bank_directory / "manifest.json").stat().st_mtime_ns
    continued = qimera("quantize", "--settings", finished_run / "settings.json", "--output", run.path)
    assert continued.exit_code == 0, continued.stderr
    assert "continues where it was interrupted; its bank is complete" in said(continued)
    assert (run.bank_directory / "manifest.json").stat().st_mtime_ns == bank_written
    assert steps_of(run.path) == steps_of(finished_run)
    assert_same_tensors(run.student_file, finished_run / "student.safetensors")


def test_evaluate_prints_student_teacher_drop_and_agreement(finished_run: Path, digits: Path) -> None:
    table = qimera("evaluate", finished_run, "--data", digits)
    assert table.exit_code == 0, table.stderr
    for word in ("top-1", "top-5", "student", "teacher", "drop", "agreement", "20"):
        assert word in table.stdout
    for_machines = qimera("evaluate", finished_run, "--data", digits, "--json")
    values = json.loads(for_machines.stdout)
    assert values["num_images"] == 20
    assert values["drop"] == pytest.approx(values["teacher_top1"] - values["student_top1"])
    assert 0 <= values["agreement"] <= 100
    assert values["student_top5"] >= values["student_top1"]


def test_the_working_directory_is_named_where_it_holds_the_images(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = shutil.copytree(finished_run, tmp_path / "run")
    for number in range(10):
        (tmp_path / "digits" / str(number)).mkdir(parents=True)
        Image.new("L", (8, 8), number).save(tmp_path / "digits" / str(number) / "0.png")
    monkeypatch.chdir(tmp_path / "digits")
    done = qimera("evaluate", copied, "--data", ".")
    assert done.exit_code == 0, done.stderr
    assert RunDirectory.open(copied).measured.data == "digits"


def test_evaluate_measures_a_student_whose_bank_is_gone(tmp_path: Path, finished_run: Path, digits: Path) -> None:
    copied = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(copied / "bank")
    result = qimera("evaluate", copied, "--data", digits)
    assert result.exit_code == 0, result.stderr
    assert "the report stays as it is (bank" in said(result)
    assert RunDirectory.open(copied).measured.num_images == 20


def test_inspect_shows_classes_batch_norms_and_layers() -> None:
    result = qimera("inspect", "mnist_cnn")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"classes +10, from fc with 64 features", result.stdout)
    assert re.search(r"stage1.conv1 +conv2d +16 x 16 x 3 x 3 +1,806,336", result.stdout)
    assert len(result.stdout.splitlines()) < 40


def test_a_network_of_sixteen_layers_is_listed_whole_and_a_longer_one_is_not() -> None:
    def network(count: int) -> nn.Module:
        layers = [layer for _ in range(count - 1) for layer in (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 3))

    spec = InputSpec(shape=(4, 8, 8), mean=(0.5,) * 4, std=(0.25,) * 4)
    tables = {
        count: layer_table(inspection("m", Teacher.capture(network(count), spec)).layers, False) for count in (16, 17)
    }
    assert {count: table.row_count for count, table in tables.items()} == {16: 16, 17: 9}


def test_an_untrained_network_is_told_before_the_work_begins(tmp_path: Path, model_file: Path) -> None:
    inspected = qimera("inspect", f"{model_file}:build", *INPUT)
    assert "warning: untrained: the running means of all 1 batch norms are 0 and their variances 1" in said(inspected)
    assert "did you forget --weights" in said(inspected)
    made = qimera(
        "synthesize", f"{model_file}:build", *INPUT, "--recipe", "ptq", "--output", tmp_path / "b", "--strict"
    )
    assert made.exit_code == 5
    assert made.stderr.startswith("warning: untrained")
    assert (tmp_path / "b").exists()  # the bank is kept, whatever it is worth


def test_data_dependent_control_flow_is_one_message_that_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "flow.py").write_text(FLOW)
    result = qimera("inspect", f"{tmp_path / 'flow.py'}:Flow", *INPUT)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "depends on the values of a tensor (flow.py, line 11: if x.sum() > 0:)" in result.stderr


def test_recipes_say_what_they_do_to_images_of_this_size() -> None:
    tables = (qimera("recipes", "--input-shape", shape).stdout for shape in ("3,32,32", "3,224,224"))
    small, large = (re.sub(r"\s+", " ", table) for table in tables)
    assert "logits and block outputs" in small
    assert "logits and block outputs" not in large
    assert large.count("no training") >= 3


def test_recipes_name_the_option_that_they_refuse() -> None:
    result = qimera("recipes", "--input-shape", "32,32,3")
    assert result.exit_code == 2
    message = "--input-shape must be channels (1 to 4), height and width (at least 8), given 32,32,3; did you mean"
    assert f"qimera: {message} 3,32,32?" in said(result)


def test_recipes_lists_every_recipe_and_what_it_costs() -> None:
    result = qimera("recipes", "--num-classes", 100)
    assert result.exit_code == 0
    for name in ("fast", "best", "paper"):
        assert re.search(rf"^ *{name} ", result.stdout, re.MULTILINE)


def test_an_embedded_model_takes_other_pixels_than_its_own() -> None:
    result = qimera("inspect", "mnist_cnn", "--pixel-range", "0,255", "--mean", "33.3", "--std", "78.6")
    assert "pixels 0 to 255, mean 33.3, std 78.6" in result.stdout


# --- what is refused, each with its own message and exit code ---------------------------------------------------------


def test_a_directory_that_holds_another_run_is_refused_and_left_as_it_is(tmp_path: Path, finished_run: Path) -> None:
    before = contents(finished_run)
    tiny_settings(seed=7).save(tmp_path / "settings.json")
    result = qimera("quantize", "--settings", tmp_path / "settings.json", "--output", finished_run)
    assert result.exit_code == 2
    assert "other settings (seed: 0 there, 7 now); choose another --output" in said(result)
    assert contents(finished_run) == before


def test_a_run_of_the_same_settings_but_other_weights_is_refused(tmp_path: Path, finished_run: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    summary = tmp_path / "run" / "summary.json"
    summary.write_text(re.sub(r'"teacher_hash": "\w+"', '"teacher_hash": "0123"', summary.read_text()))
    result = qimera("quantize", "--settings", finished_run / "settings.json", "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "had other weights then" in said(result)


def test_a_bank_of_another_teacher_is_refused(tmp_path: Path, model_file: Path, finished_run: Path) -> None:
    options = (*INPUT, "--bank", finished_run / "bank", "--output", tmp_path / "run")
    result = qimera("quantize", f"{model_file}:build", *options)
    assert result.exit_code == 2
    assert "made for another teacher" in said(result)
    assert not (tmp_path / "run").exists()


def test_a_bank_without_a_generator_is_refused_for_a_recipe_that_draws_fresh_samples(
    tmp_path: Path, finished_run: Path
) -> None:
    options = (*INPUT, "--recipe", "paper", "--bank", finished_run / "bank", "--output", tmp_path / "run")
    result = qimera("quantize", SMALL, *options)
    assert result.exit_code == 2
    assert "fresh_share" in said(result)
    assert list(tmp_path.iterdir()) == []


def test_a_bank_is_never_overwritten(tmp_path: Path, finished_run: Path) -> None:
    result = qimera("synthesize", "mnist_cnn", "--output", finished_run / "bank")
    assert result.exit_code == 2
    assert "exists already" in said(result)


def test_settings_beside_other_options_are_refused(tmp_path: Path, finished_run: Path) -> None:
    options = ("mnist_cnn", "--bits", "w2a2", "--seed", 0, "--settings", finished_run / "settings.json")
    result = qimera("quantize", *options, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "leave out MODEL, --bits, --seed" in said(result)
    missing = qimera("quantize", "--settings", tmp_path / "none.json", "--output", tmp_path / "run")
    assert missing.exit_code == 2
    assert "no such file" in said(missing)


def test_evaluate_refuses_what_is_no_finished_run(tmp_path: Path, finished_run: Path, digits: Path) -> None:
    result = qimera("evaluate", tmp_path, "--data", digits)
    assert result.exit_code == 2
    assert "not a run" in said(result)
    shutil.copytree(finished_run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    result = qimera("evaluate", tmp_path / "run", "--data", digits)
    assert result.exit_code == 2
    assert "interrupted" in said(result)


def test_evaluate_refuses_images_of_other_classes_and_missing_files(tmp_path: Path, finished_run: Path) -> None:
    np.savez(tmp_path / "other.npz", images=np.zeros((2, 8, 8, 1), np.uint8), labels=np.array([3, 10]))
    result = qimera("evaluate", finished_run, "--data", tmp_path / "other.npz")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "10" in said(result)
    assert "class" in said(result)
    result = qimera("evaluate", finished_run, "--data", tmp_path / "missing.npz")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "missing.npz: no such file" in said(result)


def test_debug_shows_the_traceback_and_keeps_the_exit_code(tmp_path: Path) -> None:
    result = qimera("quantize", "mnist_cnn", "--bits", "w9a9", "--output", tmp_path / "run", "--debug")
    assert result.exit_code == ConfigError.exit_code
    assert "Traceback" in result.stderr


# --- progress ---------------------------------------------------------------------------------------------------------


def test_progress_without_a_terminal_is_a_line_at_both_ends_of_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay() as display:
        display(Progress("direct", 0, 100, note="patience"))
        for step in range(1, 101):
            display(Progress("direct", step, 100, {"ce": 0.5}))
    captured = capsys.readouterr()
    assert captured.out == ""
    first, *_, last = captured.err.splitlines()
    assert re.fullmatch(rf"{TIME} optimise images: 0/100  patience", first)
    assert re.fullmatch(rf"{TIME} optimise images: 100/100  ce 0\.5", last)
    assert len(captured.err.splitlines()) <= 3


def test_the_time_left_is_that_of_the_steps_after_the_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 60.0, 66.0, 72.0])
    monkeypatch.setattr("qimera.cli.console.time.monotonic", lambda: next(now))
    with ProgressDisplay() as display:
        for step in (0, 1, 3, 5):
            display(Progress("direct", step, 105))
    *_, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"{TIME} optimise images: 5/105  300 s left", last)


def test_a_stage_that_comes_again_is_counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qimera.cli.console.Console", lambda stderr: Console(file=io.StringIO(), force_terminal=True))
    with ProgressDisplay() as display:
        for total in (8000, 32000):
            for step in (0, total // 2, total):
                display(Progress("distillation", step, total))
            (task,) = display._bars.tasks
            assert (task.completed, task.total) == (total, total)


@pytest.mark.parametrize(("width", "has_losses"), [(60, False), (80, False), (120, True)])
def test_bar_count_and_time_left_are_shown_at_every_width_and_losses_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, width: int, has_losses: bool
) -> None:
    shown = io.StringIO()
    terminal = lambda stderr: Console(file=shown, force_terminal=True, width=width, color_system=None)  # noqa: E731
    monkeypatch.setattr("qimera.cli.console.Console", terminal)
    with ProgressDisplay() as display:
        display(Progress("distillation", 0, 32000, note="patience"))
        display(Progress("distillation", 12345, 32000, {"kl": 0.125, "features": 0.5}))
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", shown.getvalue()).replace("\r", "\n").splitlines()
    last = [line for line in lines if "train the student" in line][-1]
    assert len(last.rstrip()) <= width
    assert re.search(r"train the student +\S+ +12345/32000 .*left (-|\d)", last)
    assert ("kl 0.125  features 0.5" in last) is has_losses
    assert has_losses or any("patience" in line for line in lines)  # a line of its own where losses have no room


@pytest.mark.parametrize("width", [60, 80, 120])
def test_runs_are_told_apart_at_every_width(finished_run: Path, width: int) -> None:
    table = io.StringIO()
    Console(file=table, width=width).print(comparison_table([RunDirectory.open(finished_run)], width))
    assert max(map(len, table.getvalue().splitlines())) <= width
    for word in ("run", "bits", "w4a4", "recipe", "tiny", "estimated drop"):
        assert word in table.getvalue()
    head = table.getvalue().splitlines()[1].split()
    assert head[:3] == ["run", "bits", "recipe"]  # on one line
    assert ("time" in head) is (width == 120)


def interrupt_training(progress: Progress) -> None:
    if progress.stage == "distillation":
        raise KeyboardInterrupt


def steps_of(run: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"]) for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_tensors(first: Path, second: Path) -> None:
    one, two = load_file(first), load_file(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
