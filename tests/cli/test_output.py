"""What programs read: one JSON object on stdout, its schema, and lines of text on stderr."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import typer
from jsonschema import Draft202012Validator

from qimera.cli.arguments import OutputOptions
from qimera.cli.output import speaking
from qimera.cli.results import PRINTED
from qimera.cli.schemas import schema_of
from qimera.machine.files import replacing
from qimera.runs.directory import RunDirectory
from tests.command_line import INPUT, SMALL, qimera, said

ROOT = Path(__file__).parents[2]
NAMES = ("summary", *PRINTED)
TINY = ("--recipe", "ptq", "--set", "synthesis.num_optimized=16", "--set", "direct.num_steps=1")
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"


def printed(*arguments: object, exit_code: int = 0) -> dict[str, Any]:
    """Run a command with ``--json`` and return the object that it prints, checked against the command's schema."""
    result = qimera(*arguments, "--json")
    assert result.exit_code == exit_code, result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    Draft202012Validator(schema_of(str(arguments[0]))).validate(values)
    return values


# --- one object for each command --------------------------------------------------------------------------------------


def test_inspect_prints_its_facts_and_every_layer() -> None:
    values = printed("inspect", "mnist_cnn")
    assert values["error"] is None
    assert (values["num_classes"], values["num_parameters"], values["float_bytes"]) == (
        10,
        77754,
        4 * (77754 + 2 * 336),
    )
    assert values["layers"][1]["weight_shape"] == [16, 16, 3, 3]
    assert values["multiply_adds"] == sum(layer["multiply_adds"] for layer in values["layers"])
    assert values["packed_bytes"]["w4a4"] < values["packed_bytes"]["w8a8"] < values["float_bytes"]


def test_synthesize_prints_the_bank(tmp_path: Path, finished_run: Path) -> None:
    options = (*INPUT, "--bank", finished_run / "bank", "--format", "npz", "--output", tmp_path / "bank.npz")
    values = printed("synthesize", SMALL, *options)
    assert (values["bank"], values["format"]) == (str(tmp_path / "bank.npz"), "npz")
    assert values["num_samples"] == 16
    assert values["hash"] == RunDirectory.open(finished_run).summary().bank_hash


def test_quantize_prints_a_summary_for_each_of_several_bits(tmp_path: Path) -> None:
    values = printed("quantize", SMALL, *INPUT, *TINY, "--bits", "w8a8,w4a4", "--output", tmp_path)
    assert [each["summary"]["bits"] for each in values["runs"]] == ["w8a8", "w4a4"]
    for each in values["runs"]:
        assert each["summary"] == json.loads((Path(each["run"]) / "summary.json").read_text())
        assert Path(each["report"]).is_file()


def test_export_report_and_compare_print_what_they_found(tmp_path: Path, finished_run: Path) -> None:
    exported = printed("export", finished_run, "--output", tmp_path / "x.onnx")
    assert exported["num_bytes"] == (tmp_path / "x.onnx").stat().st_size
    assert exported["comparisons"][0]["agreement"] == 100
    report = printed("report", finished_run)
    assert json.loads(Path(report["data"]).read_text())["summary"]["bits"] == "w4a4"
    (row,) = printed("compare", finished_run)["runs"]
    assert row["bytes"] == RunDirectory.open(finished_run).summary().student_bytes


def test_evaluate_prints_accuracy_and_drop(tmp_path: Path, finished_run: Path, digits: Path) -> None:
    copied = shutil.copytree(finished_run, tmp_path / "run")
    values = printed("evaluate", copied, "--data", digits)
    assert values["drop"] == pytest.approx(values["teacher_top1"] - values["student_top1"])


def test_warnings_go_to_stderr_where_an_object_goes_to_stdout(tmp_path: Path, finished_run: Path) -> None:
    quantized = qimera("quantize", SMALL, *INPUT, *TINY, "--output", tmp_path / "run", "--quiet", "--json")
    compared = qimera("compare", finished_run, "--json", "--strict")
    (summary,) = (each["summary"] for each in json.loads(quantized.stdout)["runs"])
    (row,) = json.loads(compared.stdout)["runs"]
    assert quantized.stderr.splitlines() == [f"warning: {warning}" for warning in summary["warnings"]]
    *shown, _ = compared.stderr.splitlines()
    assert shown == [f"warning: {finished_run}: {warning}" for warning in row["warnings"]]


def test_recipes_prints_every_recipe() -> None:
    values = printed("recipes", "--num-classes", 100)
    assert values["num_classes"] == 100
    assert [each["num_steps"] for each in values["recipes"] if each["name"] == "ptq"] == [0]


# --- what fails -------------------------------------------------------------------------------------------------------


def test_an_error_is_an_object_too_with_the_same_message_and_exit_code(tmp_path: Path) -> None:
    command = ("quantize", "mnist_cnn", "--bits", "w9a9", "--output", tmp_path / "run")
    values = printed(*command, exit_code=2)
    assert values.keys() == {"error"}
    assert (values["error"]["kind"], values["error"]["exit_code"]) == ("ConfigError", 2)
    assert f"qimera: {values['error']['message']}\n" == qimera(*command).stderr


def test_an_interruption_is_an_object_too(tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text("def build():\n    raise KeyboardInterrupt\n")
    values = printed("inspect", f"{tmp_path}/stopped.py:build", *INPUT, exit_code=130)
    assert values["error"] == {"kind": "KeyboardInterrupt", "message": "interrupted", "exit_code": 130}


def test_a_request_to_terminate_leaves_nothing_half_written(tmp_path: Path) -> None:
    """It ends a command as Ctrl-C does, and after the command the process as it always does."""

    def write() -> None:
        with speaking(OutputOptions(quiet=True)), replacing(tmp_path / "x") as written:
            written.write_text("half")
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(typer.Exit) as ending:
        write()
    assert ending.value.exit_code == 130
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_result_that_fails_a_check_is_printed_with_the_error(finished_run: Path) -> None:
    values = printed("compare", finished_run, "--max-drop", 0, exit_code=5)
    assert len(values["runs"]) == 1
    assert values["error"]["kind"] == "VerificationError"
    assert "has no estimated drop to compare with 0 points" in values["error"]["message"]


def test_runs_that_were_finished_before_an_error_are_printed(tmp_path: Path) -> None:
    (tmp_path / "w4a4").mkdir()
    (tmp_path / "w4a4" / "other").touch()
    values = printed("quantize", SMALL, *INPUT, *TINY, "--bits", "w8a8,w4a4", "--output", tmp_path, exit_code=2)
    assert [each["summary"]["bits"] for each in values["runs"]] == ["w8a8"]
    assert values["error"]["kind"] == "ConfigError"


def test_of_several_processes_the_first_one_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert qimera("recipes", "--json").stdout == ""


# --- lines on stderr --------------------------------------------------------------------------------------------------


def test_every_line_that_is_no_warning_and_no_hint_begins_with_the_time(tmp_path: Path) -> None:
    result = qimera("quantize", SMALL, *INPUT, *TINY, "--output", tmp_path / "run")
    lines = result.stderr.splitlines()
    timed = [line for line in lines if re.match(rf"{TIME} \w", line)]
    assert {line.split(" ", 1)[1].split(":")[0] for line in timed} >= {"optimise images", "writing the report"}
    others = [line for line in lines if line not in timed]
    assert all(line.startswith(("warning: ", "report: ", "next: ")) for line in others), others


def test_the_next_command_quotes_a_path_with_spaces(tmp_path: Path) -> None:
    path = tmp_path / "my runs" / "digits"
    result = qimera("quantize", SMALL, *INPUT, *TINY, "--output", path)
    assert result.stderr.splitlines()[-1] == f"next: qimera export '{path}'"


def test_quiet_leaves_warnings_and_results_alone(tmp_path: Path) -> None:
    result = qimera("quantize", SMALL, *INPUT, *TINY, "--output", tmp_path / "run", "--quiet")
    assert result.exit_code == 0
    assert result.stdout == (tmp_path / "run" / "summary.txt").read_text()
    assert all(line.startswith("warning: ") for line in result.stderr.splitlines()), result.stderr
    again = qimera("quantize", SMALL, *INPUT, *TINY, "--output", tmp_path / "run", "-q")
    assert (again.stdout, again.stderr) == (result.stdout, "")
    wrong = qimera("evaluate", tmp_path, "--data", tmp_path, "--quiet")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "not a run" in said(wrong)


def test_the_log_is_lines_with_the_time(tmp_path: Path) -> None:
    text = "import logging\n\n\ndef build():\n    logging.getLogger('qimera.test').warning('slow %s', 'disk')\n"
    (tmp_path / "logging_model.py").write_text(text)
    result = qimera("inspect", f"{tmp_path}/logging_model.py:build", *INPUT)
    assert re.search(rf"^{TIME} warning: slow disk$", result.stderr, re.MULTILINE)


# --- schemas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_in_the_docs_is_the_one_that_qimera_prints(name: str) -> None:
    """Write it anew with ``qimera schema NAME > docs/schemas/NAME.json``."""
    result = qimera("schema", name)
    assert result.stdout == (ROOT / "docs" / "schemas" / f"{name}.json").read_text()
    Draft202012Validator.check_schema(json.loads(result.stdout))


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_says_what_every_key_means(name: str) -> None:
    schema = schema_of(name)
    for part in (schema, *schema["$defs"].values()):
        for key, value in part.get("properties", {}).items():
            assert value.get("description"), key


def test_summaries_keep_to_the_schema_and_a_wrong_one_does_not(finished_run: Path) -> None:
    validator = Draft202012Validator(schema_of("summary"))
    summary = json.loads((finished_run / "summary.json").read_text())
    validator.validate(summary)
    assert not validator.is_valid({**summary, "seed": "one"})
    assert not validator.is_valid({**summary, "unknown": 1})
    assert not validator.is_valid({key: value for key, value in summary.items() if key != "bits"})
