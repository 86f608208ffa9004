"""What was typed of a value so far -> values that it may become; nothing here loads torch."""

from collections.abc import Iterator
from pathlib import Path

from qimera.config.recipe_names import RECIPE_NAMES

_BITS = ("w8a8", "w4a8", "w4a4", "w3a3", "w2a2")
_WEIGHTS = Path(__file__).parents[1] / "teacher" / "weights"
_LIBRARIES = ("timm:", "torchvision:", "hf-hub:")


def recipes(incomplete: str) -> list[str]:
    """Return names of recipes; of several, the last one is completed."""
    return _last_of_several(incomplete, RECIPE_NAMES)


def bits(incomplete: str) -> list[str]:
    """Return common bits; of several, the last ones are completed."""
    return _last_of_several(incomplete, _BITS)


def models(incomplete: str) -> list[str]:
    """Return embedded models, libraries, and files of Python or of programs."""
    names = [path.stem for path in sorted(_WEIGHTS.glob("*.safetensors"))]
    files = [
        f"{found}/" if path.is_dir() else f"{found}:" if path.suffix == ".py" else found
        for found, path in _paths(incomplete)
        if path.is_dir() or path.suffix in (".py", ".pt2")
    ]
    return [each for each in (*names, *_LIBRARIES, *files) if each.startswith(incomplete)]


def runs(incomplete: str) -> list[str]:
    """Return run directories, and directories that may hold some."""
    return [
        found if (path / "settings.json").is_file() else f"{found}/"
        for found, path in _paths(incomplete)
        if path.is_dir()
    ]


def devices(incomplete: str) -> list[str]:
    """Return kinds of devices."""
    return [each for each in ("auto", "cpu", "cuda") if each.startswith(incomplete)]


def budgets(incomplete: str) -> list[str]:
    """Return what a budget can be of."""
    return [each for each in ("size=", "bops=") if each.startswith(incomplete)]


def _last_of_several(incomplete: str, values: tuple[str, ...]) -> list[str]:
    before, comma, last = incomplete.rpartition(",")
    taken = before.split(",")
    return [f"{before}{comma}{each}" for each in values if each.startswith(last) and each not in taken]


def _paths(incomplete: str) -> Iterator[tuple[str, Path]]:
    """Yield what starts with ``incomplete``, as a user would type it, and where it is."""
    folder, slash, start = incomplete.rpartition("/")
    try:
        paths = sorted(Path(folder + slash or ".").iterdir())
    except OSError:
        return
    for path in paths:
        if path.name.startswith(start) and not path.name.startswith("."):
            yield f"{folder}{slash}{path.name}", path
