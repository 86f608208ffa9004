"""Results of the benchmarks -> the tables of README.md and docs/, between the markers that bear their names.

python -m benchmarks.tables            # writes them
python -m benchmarks.tables --check    # fails when one is out of date
"""

import argparse
import re
from pathlib import Path

from benchmarks.accuracy.tables import (
    drops,
    ends,
    few_images,
    pareto,
    peers,
    published,
    reached,
    reproduction,
    superposition,
    told,
    without_norms,
)
from benchmarks.estimation.tables import estimation_tables
from benchmarks.export.tables import agreement, arm, inference, litert, roundings
from benchmarks.pictures.tables import features
from benchmarks.privacy.tables import privacy_tables
from benchmarks.speed.tables import speed_tables

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ACCURACY = ROOT / "docs" / "accuracy.md"
ESTIMATION_PAGE = ROOT / "docs" / "estimation.md"
EXPORT_TARGETS = ROOT / "docs" / "export-targets.md"
MIXED_PRECISION = ROOT / "docs" / "mixed-precision.md"
INGREDIENTS = ROOT / "docs" / "ingredients.md"
REPRODUCTION = ROOT / "docs" / "reproduction.md"
PRIVACY = ROOT / "docs" / "privacy.md"
YOUR_IMAGES = ROOT / "docs" / "your-images.md"
RECIPES_PAGE = ROOT / "docs" / "recipes.md"
SPEED_PAGE = ROOT / "docs" / "speed.md"


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    update(README, {"reached": reached()}, check=check)
    update(ACCURACY, {"drops": drops(), "published": published()}, check=check)
    ingredients = {"peers": peers(), "superposition": superposition(), "without_norms": without_norms()}
    update(INGREDIENTS, ingredients, check=check)
    update(REPRODUCTION, {"reproduction": reproduction(), "features": features()}, check=check)
    update(RECIPES_PAGE, {"ends": ends()}, check=check)
    update(SPEED_PAGE, speed_tables(), check=check)
    update(ESTIMATION_PAGE, {**estimation_tables(), "recipes": told()}, check=check)
    update(PRIVACY, privacy_tables(), check=check)
    update(YOUR_IMAGES, {"few_images": few_images()}, check=check)
    update(MIXED_PRECISION, {"pareto": pareto()}, check=check)
    exported = {"inference": inference(), "agreement": agreement(), "litert": litert()}
    update(EXPORT_TARGETS, {**exported, "roundings": roundings(), "arm": arm()}, check=check)


def update(path: Path, tables: dict[str, str], *, check: bool) -> None:
    """Put each table between its markers in the file, or fail where it is not there already."""
    before = path.read_text()
    after = before
    for name, table in tables.items():
        block = f"<!-- {name}: begin -->\n{table}<!-- {name}: end -->"
        after, count = re.subn(
            rf"<!-- {name}: begin -->.*?<!-- {name}: end -->", lambda _, b=block: b, after, flags=re.S
        )
        if count != 1:
            raise SystemExit(f"{path.name}: expected the markers of table {name!r} once, found {count}")
    if not check:
        path.write_text(after)
    elif after != before:
        raise SystemExit(f"{path.name} is out of date; run: python -m benchmarks.tables")


if __name__ == "__main__":
    main()
