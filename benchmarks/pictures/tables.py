"""Results of this folder -> the table of features in docs/reproduction.md."""

import json
from pathlib import Path

FEATURES = Path(__file__).parent / "results" / "features"


def features() -> str:
    """One row per kind of images: how far from real ones, and how near to a boundary."""
    rows = [
        "| images | kind | number | to the nearest real image | from real images to the nearest | margin below 0.1 "
        "| below 0.3 | below 0.5 |\n",
        "|---|---|---|---|---|---|---|---|\n",
    ]
    for path in sorted(FEATURES.glob("*.json")):
        for each in json.loads(path.read_text())["rows"]:
            margins = " | ".join(f"{share:.1f} %" for share in each["margins"].values())
            rows.append(
                f"| {each['way']} | {each['kind']} | {each['num_samples']} | {each['to_real']:.2f} "
                f"| {each['from_real']:.2f} | {margins} |\n"
            )
    return "".join(rows)
