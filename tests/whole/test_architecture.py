"""docs/architecture.md in a form that can fail: who may import whom, and how large things may grow."""

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "qimera"

LAYERS = (
    ("errors",),
    ("machine",),
    ("config", "graph"),
    ("teacher",),
    ("synthesis", "quantization"),
    ("student",),
    ("assessment", "mixed_precision", "export"),
    ("training", "report", "lowering"),
    ("pipeline", "litert"),
    ("runs",),
    ("cli",),
)
"""From the bottom up; a room imports from those below it alone, not from its neighbours."""

HEIGHT = {room: height for height, layer in enumerate(LAYERS) for room in layer}


def modules() -> Iterator[tuple[str, Path]]:
    """Yield the room of every module of the package, and its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.name not in ("__init__.py", "__main__.py") or len(relative.parts) > 1:
            yield relative.parts[0].removesuffix(".py"), path


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the room of every import of a file, those inside of functions too, and the imported module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qimera."):
            yield str(node.module).split(".")[1], str(node.module)


def test_rooms_import_from_those_below_them_alone() -> None:
    found = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for room, path in modules()
        for other, module in imports(path)
        if other != room and HEIGHT[other] >= HEIGHT[room]
    ]
    assert not found


def test_few_arrows_lead_from_room_to_room() -> None:
    arrows = {(room, other) for room, path in modules() for other, _ in imports(path) if other != room}
    assert len(arrows) <= 110


def test_no_room_and_no_file_is_too_large() -> None:
    files: dict[str, int] = {}
    for room, path in modules():
        files[room] = files.get(room, 0) + (path.name != "__init__.py")
        assert len(path.read_text().splitlines()) <= 350, path
    assert max(files.values()) <= 12


def test_functions_fit_on_a_screen() -> None:
    lengths = {
        f"{path.relative_to(PACKAGE)}: {node.name}": len(body)
        for _, path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        for body in [range(node.body[0].lineno, (node.end_lineno or 0) + 1)]
    }
    assert statistics.median(lengths.values()) <= 8
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_the_page_shows_the_layers_as_they_are() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawn = re.search(r"```\n(.*?)```", page, re.S)
    assert drawn
    rows = [set(re.findall(r"[a-z_]+", line.split("|")[0])) for line in drawn[1].splitlines()]
    assert rows == [set(layer) for layer in reversed(LAYERS)]
