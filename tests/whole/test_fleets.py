"""docs/fleets.md: its commands and its Python, as they stand there."""

import json
import re
import shlex
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from qimera.cli.app import app
from qimera.cli.schemas import schema_of
from tests.command_line import INPUT, SMALL

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "fleets.md").read_text().partition("## Results for programs")[2]


def test_the_commands_of_the_page_print_what_its_python_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a network of three layers, and samples so few that there is no estimate, which the gate refuses."""
    monkeypatch.chdir(tmp_path)
    (commands,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    few = (*INPUT, "--set", "synthesis.num_optimized=16", "--set", "direct.num_steps=2")
    for line in commands.splitlines():
        typed, _, file = line.partition(" > ")
        words = [SMALL if word == "mnist_cnn" else word for word in shlex.split(typed)[1:]]
        result = CliRunner().invoke(app, [*words, *(few if words[0] == "quantize" else ())])
        Path(file).write_text(result.stdout)
        if words[0] != "schema":
            Draft202012Validator(schema_of(words[0])).validate(json.loads(result.stdout))
        assert result.exit_code == (5 if words[0] == "compare" else 0), result.stderr
    printed = {name: json.loads(Path(f"{name}.json").read_text()) for name in ("quantized", "exported", "compared")}
    assert [each["summary"]["bits"] for each in printed["quantized"]["runs"]] == ["w8a8", "w4a8"]
    assert printed["compared"]["error"]["exit_code"] == 5
    validator = Draft202012Validator(json.loads(Path("summary.schema.json").read_text()))
    summaries = [json.loads(path.read_text()) for path in sorted(Path("runs").glob("**/summary.json"))]
    for summary in summaries:
        validator.validate(summary)
    (python,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(python, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"runs/mnist/w4a8 w4a8 {summaries[0]['student_bytes']} bytes drop unknown statistics: ")


def test_the_page_names_every_exit_code() -> None:
    epilog = app.info.epilog or ""
    codes = re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)
    assert codes == re.findall(r"\b(\d+) \w", str(epilog))
