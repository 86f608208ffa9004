import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEVIATIONS = (ROOT / "docs" / "deviations.md").read_text()
PAPER_MAP = (ROOT / "docs" / "paper-map.md").read_text()


def rows() -> list[str]:
    """Return the numbers of the table's rows, in order."""
    return re.findall(r"^\| (D\d+) \|", DEVIATIONS, re.MULTILINE)


def names_of_tests() -> set[str]:
    """Return the names of all tests."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")]
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}


def code_references() -> dict[str, set[str]]:
    """Return which rows each source file mentions."""
    return {path.name: set(re.findall(r"deviation (D\d+)", path.read_text())) for path in (ROOT / "src").rglob("*.py")}


def test_rows_of_deviations_are_numbered_without_gap_or_repetition() -> None:
    numbers = sorted(int(row[1:]) for row in rows())
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_deviation_that_the_code_names_has_a_row() -> None:
    named = set().union(*code_references().values())
    assert {"D3", "D4", "D5", "D7", "D8", "D9"} <= named
    assert named <= set(rows())


def test_every_deviation_that_the_map_names_has_a_row() -> None:
    assert set(re.findall(r"\bD\d+\b", PAPER_MAP)) <= set(rows())


def test_every_row_of_deviations_has_all_columns_and_a_test() -> None:
    lines = [line for line in DEVIATIONS.splitlines() if re.match(r"\| D\d+ \|", line)]
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == 6, line
        assert all(cells[3:]), line
        assert re.fullmatch(r"`test_\w+`", cells[5]), line


@pytest.mark.parametrize("text", [DEVIATIONS, PAPER_MAP], ids=["deviations", "paper-map"])
def test_every_test_that_a_table_names_exists(text: str) -> None:
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 15
    assert named <= names_of_tests()


def test_every_function_that_the_map_names_exists() -> None:
    named = re.findall(r"`((?:synthesis|quantization|training|mixed_precision)[\w.]*\.\w+)`", PAPER_MAP)
    assert len(named) > 15
    for name in named:
        parts = name.split(".")
        depth = next(
            i
            for i, part in enumerate(parts)
            if (ROOT / "src/qimera" / Path(*parts[: i + 1])).with_suffix(".py").exists()
        )
        found: object = importlib.import_module("qimera." + ".".join(parts[: depth + 1]))
        for part in parts[depth + 1 :]:
            found = getattr(found, part)
        assert callable(found), name


# --- other pages ------------------------------------------------------------------------------------------------------


def test_every_message_that_troubleshooting_explains_is_one() -> None:
    constants = [
        node.value
        for path in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    explained = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## Without a message")[0]
    headings = re.findall(r"^### (.+)$", explained, re.MULTILINE)
    assert len(headings) > 15
    for heading in headings:
        assert any(heading in constant for constant in constants), heading


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
