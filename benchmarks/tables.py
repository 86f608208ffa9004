"""benchmarks/results -> the README's tables, between the markers that bear their names.

python benchmarks/tables.py            # writes README.md
python benchmarks/tables.py --check    # fails when README.md is out of date
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"

Result = dict[str, Any]


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    before = README.read_text()
    after = before
    for name, table in (("drops", drops()), ("superposition", superposition())):
        block = f"<!-- {name}: begin -->\n{table}<!-- {name}: end -->"
        after, count = re.subn(
            rf"<!-- {name}: begin -->.*?<!-- {name}: end -->", lambda _, b=block: b, after, flags=re.S
        )
        if count != 1:
            raise SystemExit(f"README.md: expected the markers of table {name!r} once, found {count}")
    if not parser.parse_args().check:
        README.write_text(after)
    elif after != before:
        raise SystemExit("README.md is out of date; run: python benchmarks/tables.py")


def drops() -> str:
    """One row per network and width: top-1 and drop, mean and spread over seeds."""
    head = "| network | bits | full precision | quantized | drop | agreement | seeds | minutes, bank + student |\n"
    rows = [head, "|---|---|---|---|---|---|---|---|\n"]
    for (network, bits), found in _grouped("network", "bits", superposition=True, scheme="hardware").items():
        minutes = [
            f"{statistics.mean(each[key] for each in found) / 60:.1f}" for key in ("bank_seconds", "student_seconds")
        ]
        rows.append(
            f"| {network} | {bits.upper()} | {found[0]['full_precision']:.2f} | {_mean(found, 'top1')} | "
            f"**{_mean(found, 'drop')}** | {_mean(found, 'agreement')} | {_seeds(found)} | {' + '.join(minutes)} |\n"
        )
    return "".join(rows)


def superposition() -> str:
    """Superposition on against off, all else equal."""
    rows = ["| network | bits | superposition | top-1 | drop | seeds |\n", "|---|---|---|---|---|---|\n"]
    off = {(each["network"], each["bits"], each["recipe"]) for each in _results() if not each["superposition"]}
    for (network, bits, recipe, mixed), found in _grouped("network", "bits", "recipe", "superposition").items():
        if (network, bits, recipe) in off:
            state = "on" if mixed else "off"
            rows.append(
                f"| {network} | {bits.upper()} | {state} | {_mean(found, 'top1')} | {_mean(found, 'drop')} | "
                f"{_seeds(found)} |\n"
            )
    return "".join(rows)


def _results() -> list[Result]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/*.json"))]


def _grouped(*keys: str, **only: object) -> dict[tuple[Any, ...], list[Result]]:
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in _results():
        if all(result[key] == value for key, value in only.items()):
            groups.setdefault(tuple(result[key] for key in keys), []).append(result)
    return groups


def _mean(found: list[Result], key: str) -> str:
    values = [each[key] for each in found]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _seeds(found: list[Result]) -> str:
    return ", ".join(str(each["seed"]) for each in sorted(found, key=lambda each: each["seed"]))


if __name__ == "__main__":
    main()
