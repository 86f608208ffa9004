"""Results of this folder -> the tables of docs/privacy.md."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
_ORDER = ("resnet20_cifar10", "mobilenetv2_cifar10", "mnist_cnn", "control_cifar10")


def privacy_tables() -> dict[str, str]:
    """Return the tables by the names of their markers."""
    found = [json.loads(path.read_text()) for name in _ORDER if (path := RESULTS / f"{name}.json").exists()]
    return {"audit": _audit(found), "membership": _membership(found)}


def _audit(found: list[dict]) -> str:  # type: ignore[type-arg]
    rows = [
        "| network | bank | space | nearer to trained images by (%) | p | stands out: trained | others | copies "
        "| detected |\n",
        "|---|---|---|---|---|---|---|---|---|\n",
    ]
    for each in found:
        for row in sorted(each["rows"], key=lambda row: row["bank"].startswith("leaking")):
            rows.append(
                f"| {each['network']} | {row['bank']} | {row['space']} "
                f"| {row['nearer']:.2f} ({row['low']:.2f} to {row['high']:.2f}) | {row['p_nearer']:.3f} "
                f"| {row['standing_out']:.2f} | {row['standing_out_others']:.2f} | {row['copies']} "
                f"| {'**yes**' if row['is_detected'] else 'no'} |\n"
            )
    return "".join(rows)


def _membership(found: list[dict]) -> str:  # type: ignore[type-arg]
    rows = [
        "| network | of the | told by | members, others | AUC | members found at 1 % false alarms (%) |\n",
        "|---|---|---|---|---|---|\n",
    ]
    for each in found:
        for row in each["membership"]:
            rows.append(
                f"| {each['network']} | {row['network']} | {row['attack']} | {row['num_members']:,}, "
                f"{row['num_others']:,} | {row['auc']:.3f} ({row['auc_low']:.3f} to {row['auc_high']:.3f}) "
                f"| {row['hits_at_1_percent']:.1f} |\n"
            )
    return "".join(rows)
