"""qimera quantize --budget, from the command line to the exported student."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qimera.cli.arguments import ModelOptions, RunOptions
from qimera.cli.options import read_settings
from qimera.config.input_spec import InputSpec
from qimera.config.run_settings import RunSettings
from qimera.config.settings import LayerBits, QuantizationSettings
from qimera.machine.progress import Progress
from qimera.mixed_precision.allocation import Allocation
from qimera.quantization.sizes import float_bytes, packed_bytes, stored_layers
from qimera.runs.directory import RunDirectory
from qimera.runs.execution import carry_out, load_student
from tests.command_line import qimera, said, tiny_settings

MODEL = """
import torch
from torch import nn


def build():
    torch.manual_seed(1)
    layers = []
    for channels in ((1, 8), (8, 12), (12, 16)):
        layers += [nn.Conv2d(*channels, 3, padding=1), nn.BatchNorm2d(channels[1]), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
"""
SPEC = InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.25,))
GIVEN = (LayerBits(pattern="11", weight_bits=8, activation_bits=6),)
BUDGET = QuantizationSettings(budget="size=0.2", layer_bits=GIVEN)


@pytest.fixture(scope="module")
def settings_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    (folder / "small.py").write_text(MODEL)
    tiny_settings(f"{folder / 'small.py'}:build", input=SPEC, quantization=BUDGET).save(folder / "settings.json")
    return folder / "settings.json"


@pytest.fixture(scope="module")
def finished_run(settings_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("budget") / "run"
    result = qimera("quantize", "--settings", settings_file, "--output", path)
    assert result.exit_code == 0, result.stderr
    return path


def read(settings_file: Path, path: Path) -> tuple[RunDirectory, object, object]:
    found = read_settings(settings_file, ModelOptions(), RunOptions())
    return RunDirectory.start(path, found.settings), found.teacher, found.bank


def test_the_student_keeps_within_the_budget_and_the_bits_that_were_given(finished_run: Path) -> None:
    student, teacher = load_student(RunDirectory.open(finished_run))
    assert 0.19 * float_bytes(teacher) < packed_bytes(teacher, student.settings) <= 0.2 * float_bytes(teacher)
    assert student.settings.bits_of("11") == (8, 6)
    widths = {student.settings.bits_of(layer.name)[0] for layer in teacher.layers}
    assert len(widths) > 2


def test_no_layer_could_lose_less_with_what_the_budget_leaves(finished_run: Path) -> None:
    """Of these untrained weights a wider layer may lose more, so that some of the budget is left."""
    run = RunDirectory.open(finished_run)
    student, teacher = load_student(run)
    allocation, layers = Allocation.load(run.allocation_file), stored_layers(teacher.module)
    size, limit = packed_bytes(teacher, student.settings), 0.2 * float_bytes(teacher)
    for given in allocation.layers:
        for bits in range(2, 9):
            stored = layers[given.name]
            changed = size + stored.num_bytes(bits) - stored.num_bytes(given.weight_bits)
            loss = allocation.sensitivity.loss(given.name, bits, None)
            assert changed > limit or loss >= given.loss, (given, bits)


def test_the_settings_of_the_run_name_the_bits_of_every_layer_and_the_budget(finished_run: Path) -> None:
    quantization = RunSettings.load(finished_run / "settings.json").quantization
    allocation = Allocation.load(finished_run / "allocation.json")
    assert quantization.budget == allocation.budget == "size=0.2"
    assert quantization.layer_bits == allocation.all_rules
    assert allocation.rules == GIVEN
    _, teacher = load_student(RunDirectory.open(finished_run))
    assert all(quantization.has_rule_for(layer.name) for layer in teacher.layers)


def test_the_summary_lists_the_layers_under_their_bits(finished_run: Path) -> None:
    text = (finished_run / "summary.txt").read_text()
    assert re.search(r"^bits +w4a4, scheme hardware", text, re.MULTILINE)
    assert re.search(r"^budget +size=0.2: 0\.1\d+ of full precision, 11=w8a6 as given", text, re.M)
    for layer in Allocation.load(finished_run / "allocation.json").layers:
        assert re.search(rf"\b{re.escape(layer.name)} {layer.loss:.4f}\b", text)


def test_the_same_command_finds_the_finished_run(settings_file: Path, finished_run: Path) -> None:
    for path in (settings_file, finished_run / "settings.json"):
        again = qimera("quantize", "--settings", path, "--output", finished_run)
        assert again.exit_code == 0, again.stderr
        assert again.stdout == (finished_run / "summary.txt").read_text()


def test_another_budget_is_another_run(tmp_path: Path, settings_file: Path, finished_run: Path) -> None:
    values = json.loads(settings_file.read_text())
    values["quantization"]["budget"] = "size=0.21"
    (tmp_path / "settings.json").write_text(json.dumps(values))
    result = qimera("quantize", "--settings", tmp_path / "settings.json", "--output", finished_run)
    assert result.exit_code == 2
    assert "quantization.budget: 'size=0.2' there, 'size=0.21' now" in said(result)


def test_the_settings_of_the_run_start_the_same_run_without_measuring_again(tmp_path: Path, finished_run: Path) -> None:
    other = qimera("quantize", "--settings", finished_run / "settings.json", "--output", tmp_path / "other")
    assert other.exit_code == 0, other.stderr
    assert (tmp_path / "other" / "settings.json").read_text() == (finished_run / "settings.json").read_text()
    assert same_student(tmp_path / "other", finished_run)
    assert "sensitivity" not in stages(tmp_path / "other")


@pytest.mark.parametrize("stage", ["sensitivity", "ranges"])
def test_a_run_that_was_interrupted_continues_to_the_same_bits_and_the_same_student(
    tmp_path: Path, settings_file: Path, finished_run: Path, stage: str
) -> None:
    """Before and after the bits were found."""
    run, teacher, bank = read(settings_file, tmp_path / "run")

    def interrupt(progress: Progress) -> None:
        if progress.stage == stage and progress.step == progress.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(run, teacher, bank, interrupt)  # type: ignore[arg-type]
    assert (run.path / "allocation.json").exists() is (stage == "ranges")
    continued = qimera("quantize", "--settings", settings_file, "--output", run.path)
    assert continued.exit_code == 0, continued.stderr
    for file in ("settings.json", "allocation.json"):
        assert (run.path / file).read_text() == (finished_run / file).read_text()
    assert same_student(run.path, finished_run)
    assert stages(run.path) == stages(finished_run)


def test_quantize_takes_a_budget_as_an_option_and_refuses_what_cannot_be_met(tmp_path: Path) -> None:
    result = qimera("quantize", "mnist_cnn", "--budget", "bops=0.9", "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "budget: bops=0.9 leaves nothing to decide: at 8 bits" in said(result)
    assert not (tmp_path / "run").exists()


def stages(run: Path) -> list[str]:
    return [json.loads(line)["stage"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_student(one: Path, two: Path) -> bool:
    first, second = (load_file(path / "student.safetensors") for path in (one, two))
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
