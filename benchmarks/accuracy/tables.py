"""Results of this folder -> tables of README.md and docs/."""

import json
import statistics
from pathlib import Path
from typing import Any

from qimera.assessment.estimation import interval

RESULTS = Path(__file__).parent / "results"
DROPS = RESULTS / "drops"
INGREDIENTS = RESULTS / "ingredients"
FEW_IMAGES = RESULTS / "few_images"
PARETO = RESULTS / "pareto"
WITHOUT_NORMS = RESULTS / "without_norms"
QUEUE = Path(__file__).parents[1] / "queue" / "results"

Result = dict[str, Any]

ORDER = ["w8a8", "w4a8", "w5a5", "w4a4", "w3a3", "w2a4", "w2a2"]

_PUBLISHED = {
    ("mobilenet_v1_075_imagenet", "w5a5"): "PLF 3.95 (width 1.0)",
    ("mobilenet_v1_075_imagenet", "w4a4"): "PLF 13.9 (width 1.0)",
    ("resnet20_cifar10", "w5a5"): "Qimera 0.43",
    ("resnet20_cifar10", "w4a4"): "Qimera 2.63, SynQ 1.13",
    ("resnet20_cifar10", "w3a3"): "Qimera 19.5, SynQ 5.8",
    ("resnet20_cifar100", "w5a5"): "Qimera 1.31",
    ("resnet20_cifar100", "w4a4"): "Qimera 5.23, SynQ 2.99",
    ("resnet20_cifar100", "w3a3"): "Qimera 24.2, SynQ 13.05",
}
"""Drops as the papers give them, by network and bits; none of them compares with the same checkpoint."""

_QIMERA = {
    ("resnet20_cifar10", "w4a4"): "2.63",
    ("resnet20_cifar10", "w5a5"): "0.43",
    ("resnet20_cifar100", "w4a4"): "5.23",
}
"""Drops of Choi et al. 2021 that the benchmark queue repeats."""


def reached() -> str:
    """One row per network: the drop at each width, of ``ptq`` where training has little to win, else of ``fast``."""
    widths = ["w8a8", "w4a8", "w4a4"]
    head = " | ".join(bits.upper() for bits in widths)
    rows = [f"| network | full precision | {head} |\n", f"|---|---|{'---|' * len(widths)}\n"]
    groups = _recipes()
    for network in sorted({network for network, _, _ in groups}):
        found = [_chosen(groups, network, bits) for bits in widths]
        cells = " | ".join(_cell(each) if each else "" for each in found)
        rows.append(f"| {network} | {found[0][0]['full_precision']:.2f} | {cells} |\n")
    return "".join(rows)


def _chosen(groups: dict[tuple[Any, ...], list[Result]], network: str, bits: str) -> list[Result]:
    wide = bits.endswith("a8") and "imagenet" not in network
    order = ("ptq", "fast") if wide else ("fast", "ptq")
    return next((groups[network, bits, recipe] for recipe in order if (network, bits, recipe) in groups), [])


def _cell(found: list[Result]) -> str:
    recipe = found[0]["recipe"]
    return _mean(found, "drop") + (f" ({recipe})" if recipe != "fast" else "") + _lone(found)


def published() -> str:
    """One row per published drop: what ours are."""
    rows = ["| network | bits | published | `fast` | `best` |\n", "|---|---|---|---|---|\n"]
    groups = _recipes()
    for network, bits in sorted(_PUBLISHED, key=lambda key: _place(*key, "")):
        ours = [groups.get((network, bits, recipe)) for recipe in ("fast", "best")]
        drops = " | ".join(_mean(each, "drop") + _lone(each) if each else "" for each in ours)
        rows.append(f"| {network} | {bits.upper()} | {_PUBLISHED[network, bits]} | {drops} |\n")
    return "".join(rows)


def _lone(found: list[Result]) -> str:
    return " (one seed)" if len(found) == 1 else ""


def _recipes(first_last_bits: int = 0) -> dict[tuple[Any, ...], list[Result]]:
    kind = {"samples": "bank", "superposition": True, "scheme": "hardware"}
    return _grouped("network", "bits", "recipe", first_last_bits=first_last_bits, **kind)


def _place(network: str, bits: str, recipe: str) -> tuple[str, int, str]:
    """Return what sorts rows: many bits first."""
    return network, ORDER.index(bits), recipe


def drops() -> str:
    """One row per network, width and recipe: top-1 and drop, mean and spread over seeds, between floor and ceiling."""
    head = (
        "| network | bits | recipe | full precision | quantized | drop | agreement | floor | ceiling | gap closed "
        "| seeds | minutes, bank + student |\n"
    )
    rows = [head, "|---|---|---|---|---|---|---|---|---|---|---|---|\n"]
    kind = {"superposition": True, "scheme": "hardware"}
    floors = _grouped("network", "bits", samples="noise", **kind)
    ceilings = _grouped("network", "bits", "recipe", samples="real", **kind)
    groups = _recipes()
    for (network, bits, recipe), found in sorted(groups.items(), key=lambda item: _place(*item[0])):
        minutes = [f"{each:.1f}" for each in _minutes(found)]
        limits = _limits(found, floors.get((network, bits), []), ceilings.get((network, bits, recipe), []))
        rows.append(
            f"| {network} | {bits.upper()} | {recipe} | {found[0]['full_precision']:.2f} | {_mean(found, 'top1')} | "
            f"**{_mean(found, 'drop')}** | {_mean(found, 'agreement')} | {' | '.join(limits)} | {_seeds(found)} | "
            f"{' + '.join(minutes)} |\n"
        )
    return "".join(rows)


def ends() -> str:
    """One row per network, width and recipe: the first and the last layer at 8 bits against as many bits as all."""
    rows = [
        "| network | bits | recipe | drop | first and last layer at 8 bits | gained | seeds |\n",
        "|---|---|---|---|---|---|---|\n",
    ]
    plain = _recipes()
    for (network, bits, recipe), found in sorted(_recipes(8).items(), key=lambda item: _place(*item[0])):
        seeds = {each["seed"] for each in found}
        beside = [each for each in plain.get((network, bits, recipe), []) if each["seed"] in seeds]
        before = {each["seed"]: each["drop"] for each in beside}
        gains = [{"gain": before[each["seed"]] - each["drop"]} for each in found if each["seed"] in before]
        rows.append(
            f"| {network} | {bits.upper()} | {recipe} | {_mean(beside, 'drop') if beside else ''} | "
            f"**{_mean(found, 'drop')}** | {_mean(gains, 'gain') if gains else ''} | {_seeds(found)} |\n"
        )
    return "".join(rows)


def _minutes(found: list[Result]) -> list[float]:
    """Return the minutes of bank and student on the CPU, or elsewhere where there are no others."""
    on_cpu = [each for each in found if each.get("device", "cpu") == "cpu"] or found
    return [statistics.mean(each[key] for each in on_cpu) / 60 for key in ("bank_seconds", "student_seconds")]


def _limits(found: list[Result], floor: list[Result], ceiling: list[Result]) -> list[str]:
    """Return the drops of floor and ceiling, and the share of the way from one to the other that was made."""
    shown = [f"{_mean(each, 'drop')}" if each else "" for each in (floor, ceiling)]
    if not floor or not ceiling:
        return [*shown, ""]
    reached, lowest, highest = (statistics.mean(each["drop"] for each in group) for group in (found, floor, ceiling))
    return [*shown, f"{100 * (lowest - reached) / (lowest - highest):.1f} %"]


def reproduction() -> str:
    """One row per setting of the paper: its drop, its recipe here, and ours, in its scheme."""
    rows = [
        "| network | bits | published | `paper` | released | part of `paper` | `qimera` | `fast` |\n",
        "|---|---|---|---|---|---|---|---|\n",
    ]
    found: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for each in (json.loads(path.read_text()) for path in sorted(QUEUE.glob("*.json"))):
        kind = each["variant"] or each["recipe"] if each["share"] == 1 else "part"
        found.setdefault((each["network"], each["bits"]), {}).setdefault(kind, []).append(each)
    for (network, bits), drop in sorted(_QIMERA.items(), key=lambda item: _place(*item[0], "")):
        ours = found.get((network, bits), {})
        cells = [_of_schedule(ours.get(kind, [])) for kind in ("paper", "released", "part", "qimera", "fast")]
        rows.append(f"| {network} | {bits.upper()} | {drop} | {' | '.join(cells)} |\n")
    return "".join(rows)


def _of_schedule(found: list[Result]) -> str:
    if not found:
        return "outstanding"
    shares = {each["share"] for each in found} - {1}
    return _mean(found, "drop") + _lone(found) + "".join(f", {100 * share:g} % of it" for share in shares)


def told() -> str:
    """What users are told by the shipped constants, and what they lose: the students that an estimate was kept of."""
    head = "| network | bits | recipe | seed | real drop | estimate | interval |\n"
    rows = [head, "|---|---|---|---|---|---|---|\n"]
    for each in (each for found in _recipes().values() for each in found if "superposed_error" in each):
        drop, low, high = interval(each["superposed"], each["superposed_error"])
        rows.append(
            f"| {each['network']} | {each['bits'].upper()} | {each['recipe']} | {each['seed']} | {each['drop']:.2f} "
            f"| {drop:.2f} | {low:.1f} to {high:.1f} |\n"
        )
    return "".join(rows)


def superposition() -> str:
    """Superposition on against off, all else equal."""
    rows = ["| network | bits | superposition | top-1 | drop | seeds |\n", "|---|---|---|---|---|---|\n"]
    off = {(each["network"], each["bits"], each["recipe"]) for each in _results() if not each["superposition"]}
    groups = _grouped("network", "bits", "recipe", "superposition", samples="bank")
    for (network, bits, recipe, mixed), found in groups.items():
        if (network, bits, recipe) in off:
            state = "on" if mixed else "off"
            rows.append(
                f"| {network} | {bits.upper()} | {state} | {_mean(found, 'top1')} | {_mean(found, 'drop')} | "
                f"{_seeds(found)} |\n"
            )
    return "".join(rows)


def peers() -> str:
    """One row per network and way to come by samples: the drop at each width, worst first."""
    groups: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for path in sorted(INGREDIENTS.glob("*.json")):
        result = json.loads(path.read_text())
        groups.setdefault((result["network"], result["description"]), {}).setdefault(result["bits"], []).append(result)
    widths = sorted({bits for found in groups.values() for bits in found}, reverse=True)
    head = " | ".join(f"{bits.upper()}, drop / agreement" for bits in widths)
    rows = [
        f"| network | samples | {head} | minutes, samples | seeds |\n",
        f"|---|---|{'---|' * len(widths)}---|---|\n",
    ]

    def worst_first(item: tuple[tuple[str, str], dict[str, list[Result]]]) -> tuple[str, float]:
        (network, _), found = item
        return network, -statistics.mean(each["drop"] for each in found[widths[0]])

    for (network, description), found in sorted(groups.items(), key=worst_first):
        drops = " | ".join(_drop_and_agreement(found.get(bits, [])) for bits in widths)
        every = [each for group in found.values() for each in group]
        minutes = statistics.mean(each["bank_seconds"] for each in every) / 60
        rows.append(f"| {network} | {description} | {drops} | {minutes:.1f} | {_seeds(every)} |\n")
    return "".join(rows)


def without_norms() -> str:
    """One row per network without batch norms and kind of sample: the drop at each width."""
    groups: dict[tuple[str, int, str], dict[str, list[Result]]] = {}
    for path in sorted(WITHOUT_NORMS.glob("*.json")):
        result = json.loads(path.read_text())
        key = result["network"], int(path.stem.split("-")[-2]), result["samples"]
        groups.setdefault(key, {}).setdefault(result["bits"], []).append(result)
    widths = sorted({bits for found in groups.values() for bits in found}, reverse=True)
    head = " | ".join(f"{bits.upper()}, drop / agreement" for bits in widths)
    rows = [f"| network | samples | {head} | seeds | images |\n", f"|---|---|{'---|' * len(widths)}---|---|\n"]
    for (network, _, samples), found in sorted(groups.items()):
        drops = " | ".join(_drop_and_agreement(found.get(bits, [])) for bits in widths)
        every = [each for group in found.values() for each in group]
        rows.append(f"| {network} | {samples} | {drops} | {_seeds(every)} | {every[0]['num_images']:,} |\n")
    return "".join(rows)


def few_images() -> str:
    """One row per network and number of images of the user's: drops beside samples and from images alone."""
    rows = [
        "| network | images of yours | beside the samples of `ptq` | images alone | agreement, beside | alone |\n",
        "|---|---|---|---|---|---|\n",
    ]
    found: dict[tuple[str, int], dict[str, list[Result]]] = {}
    for path in sorted(FEW_IMAGES.glob("*/*.json")):
        each = json.loads(path.read_text())
        found.setdefault((each["network"], each["count"]), {}).setdefault(each["way"], []).append(each)
    for (network, count), ways in sorted(found.items()):
        cells = [
            _mean(ways[way], key) + (_lone(ways[way]) if key == "drop" else "") if way in ways else ""
            for key in ("drop", "agreement")
            for way in ("beside", "alone")
        ]
        rows.append(f"| {network} | {count:,} | {' | '.join(cells)} |\n")
    return "".join(rows)


def _drop_and_agreement(found: list[Result]) -> str:
    return f"{_mean(found, 'drop')} / {_mean(found, 'agreement')}" if found else ""


def pareto() -> str:
    """Uniform bits against bits per layer that cost no more."""
    rows = [
        "| network | cost | of full precision | recipe | drop at uniform bits | drop by budget | gained "
        "| divergence predicted, uniform and by budget | seeds |\n",
        "|---|---|---|---|---|---|---|---|---|\n",
    ]
    groups: dict[tuple[str, ...], list[Result]] = {}
    for each in (json.loads(path.read_text()) for path in sorted(PARETO.glob("*.json"))):
        drops = {
            "uniform": each["full_precision"] - each["uniform_top1"],
            "drop": each["full_precision"] - each["top1"],
        }
        values = each | drops | {"gain": each["top1"] - each["uniform_top1"]}
        groups.setdefault(tuple(each[key] for key in ("network", "measure", "bits", "recipe")), []).append(values)
    for (network, measure, bits, recipe), found in groups.items():
        name = {"size": "size", "bops": "bit operations"}[measure]
        losses = [statistics.mean(each[key] for each in found) for key in ("uniform_loss", "loss")]
        rows.append(
            f"| {network} | {name} of {bits.upper()} | {measure}={found[0]['uniform_share']:.4f} | {recipe} "
            f"| {_mean(found, 'uniform')} | **{_mean(found, 'drop')}** | {_mean(found, 'gain')} "
            f"| {losses[0]:.3f}, {losses[1]:.3f} | {_seeds(found)} |\n"
        )
    return "".join(rows)


def _results() -> list[Result]:
    """Return the accuracies."""
    paths = sorted(DROPS.glob("*/*.json"))
    return [{"samples": "bank", "first_last_bits": 0, **json.loads(path.read_text())} for path in paths]


def _grouped(*keys: str, first_last_bits: int = 0, **only: object) -> dict[tuple[Any, ...], list[Result]]:
    """Return results by the values of these keys; those with other bits at both ends are never among the others."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in _results():
        if all(result[key] == value for key, value in (only | {"first_last_bits": first_last_bits}).items()):
            groups.setdefault(tuple(result[key] for key in keys), []).append(result)
    return groups


def _mean(found: list[Result], key: str) -> str:
    values = [each[key] for each in found]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _seeds(found: list[Result]) -> str:
    return ", ".join(str(seed) for seed in sorted({each["seed"] for each in found}))
