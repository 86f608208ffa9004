"""qimera quantize --first-last-bits, from the command line to the runs side by side."""

from pathlib import Path

import pytest

from qimera.cli.arguments import ModelOptions, RunOptions
from qimera.cli.options import resolve
from qimera.config.bits import parse_layer_bits
from qimera.config.run_settings import RunSettings
from qimera.config.settings import QuantizationSettings
from qimera.runs.comparison import comparison_table
from qimera.runs.directory import RunDirectory
from qimera.runs.execution import load_student
from tests.command_line import qimera, tiny_settings


@pytest.fixture(scope="module")
def settings_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings as a person may write them, without the rules that follow from them."""
    path = tmp_path_factory.mktemp("settings") / "settings.json"
    tiny_settings(quantization=QuantizationSettings(first_last_bits=8)).save(path)
    return path


@pytest.fixture(scope="module")
def finished_run(settings_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ends") / "run"
    result = qimera("quantize", "--settings", settings_file, "--output", path)
    assert result.exit_code == 0, result.stderr
    assert "w4a4, first and last layer at 8, scheme hardware" in result.stdout
    return path


def test_the_student_and_its_settings_have_the_bits(finished_run: Path) -> None:
    student, teacher = load_student(RunDirectory.open(finished_run))
    names = [layer.name for layer in teacher.layers]
    written = RunSettings.load(finished_run / "settings.json").quantization
    for bits in (student.settings, written):
        assert bits.bits_of(names[0]) == bits.bits_of(names[-1]) == (8, 8)
    assert written.first_last_bits == 8
    assert len(written.layer_bits) == 3


@pytest.mark.parametrize("from_run", [False, True])
def test_settings_with_and_without_the_rules_start_the_same_run(
    settings_file: Path, finished_run: Path, from_run: bool
) -> None:
    path = finished_run / "settings.json" if from_run else settings_file
    again = qimera("quantize", "--settings", path, "--output", finished_run)
    assert again.exit_code == 0, again.stderr
    assert "finished already" in again.stderr


def test_compare_and_the_report_say_it(finished_run: Path) -> None:
    table = comparison_table([RunDirectory.open(finished_run)], 400)
    (cell,) = next(column for column in table.columns if column.header == "bits").cells
    assert cell == "w4a4, first and last 8"
    assert "first and last layer at 8" in (finished_run / "report.html").read_text()
    summary = RunDirectory.open(finished_run).summary()
    assert (summary.first_last_bits, summary.layer_bits) == (8, "")


def test_the_option_comes_before_rules_by_name() -> None:
    found = resolve(ModelOptions(model="mnist_cnn"), RunOptions(first_last_bits=6))
    names = [layer.name for layer in found.teacher.layers]
    assert {found.settings.quantization.bits_of(name) for name in (names[0], names[-1])} == {(6, 6)}
    options = RunOptions(first_last_bits=6, layer_bits=f"{names[-1]}=w5a5")
    assert resolve(ModelOptions(model="mnist_cnn"), options).settings.quantization.bits_of(names[-1]) == (5, 5)


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ("*=w4a4", "bits       w4a4, except *=w4a4, scheme"),
        ("0.0=5,3=6", "bits       w4a4, except 1.0=w4a8,0.0=w5a5,3=w6a6, scheme"),
        ("3=5", "bits       w4a4, first and last layer at 8, except 3=w5a5, scheme"),
    ],
)
def test_ends_that_rules_by_name_override_are_not_said_to_have_the_bits(tmp_path: Path, rules: str, told: str) -> None:
    ends = QuantizationSettings(first_last_bits=8, layer_bits=parse_layer_bits(rules))
    tiny_settings(quantization=ends).save(tmp_path / "settings.json")
    done = qimera("quantize", "--settings", tmp_path / "settings.json", "--output", tmp_path / "run")
    assert told in done.stdout
    page = (tmp_path / "run" / "report.html").read_text()
    assert ("first and last" in page) == ("first and last" in told)
    assert "scheme hardware, target onnxruntime, except" in page
