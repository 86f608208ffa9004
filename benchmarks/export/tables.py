"""Results of this folder -> the tables of docs/export-targets.md."""

import json
from pathlib import Path
from typing import Any

from benchmarks.accuracy.tables import ORDER

RESULTS = Path(__file__).parent / "results"
INFERENCE = RESULTS / "inference"
EXPORT = RESULTS / "agreement"
LITERT = RESULTS / "litert"
ROUNDINGS = RESULTS / "roundings"
ARM = RESULTS / "arm"

Result = dict[str, Any]


def inference() -> str:
    """Size and integer layers of each exported file, its speed on each runtime, and where that was measured."""
    found = [json.loads(path.read_text()) for path in sorted(INFERENCE.glob("*.json"))]
    machines = sorted({_machine(result) for result in found})
    return "\n".join([_exported_files(found), _speed(found), *(f"{machine}\n" for machine in machines)])


def _exported_files(found: list[Result]) -> str:
    head = "| network | bits | file | full precision | smaller | integer in ONNX Runtime | integer in OpenVINO |\n"
    rows = [head, "|---|---|---|---|---|---|---|\n"]
    for result in found:
        full = result["files"]["fp32"]["bytes"]
        for bits in ("w8a8", "w4a4"):
            file = result["files"][bits]
            layers = [
                f"{file['integer_layers'][each]} of {file['num_layers']}" for each in ("ONNX Runtime", "OpenVINO")
            ]
            rows.append(
                f"| {result['network']} | {bits.upper()} | {file['bytes'] / 1000:,.0f} kB | {full / 1000:,.0f} kB | "
                f"{full / file['bytes']:.1f}x | {' | '.join(layers)} |\n"
            )
    return "".join(rows)


def _speed(found: list[Result]) -> str:
    rows = [
        "| network | runtime | threads | batch | full precision | W8A8 | W4A4 |\n",
        "|---|---|---|---|---|---|---|\n",
    ]
    for result in found:
        for row in result["timings"]:
            full, *others = (_milliseconds(row["milliseconds"][name]) for name in ("fp32", "w8a8", "w4a4"))
            times = [
                f"{time}, **{row['speedup'][bits]:.2f}x**" for time, bits in zip(others, ("w8a8", "w4a4"), strict=True)
            ]
            rows.append(
                f"| {result['network']} | {row['runtime']} | {row['threads']} | {row['batch']} | {full} | "
                f"{' | '.join(times)} |\n"
            )
    return "".join(rows)


def _milliseconds(value: float) -> str:
    """Return three digits and the unit."""
    return f"{value:#.3g}".rstrip(".") + " ms"


def _machine(result: Result) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if name != "torch")
    return f"Measured on {result['machine']}; {versions}."


def agreement() -> str:
    """Files against their students on all test images."""
    rows = [
        "| network | bits | file | ONNX Runtime: layers | same class | same logits | top-1 of student, file "
        "| OpenVINO: layers | same class | top-1 |\n",
        "|---|---|---|---|---|---|---|---|---|---|\n",
    ]
    for each in _by_network(EXPORT):
        ort, openvino = each["ONNX Runtime"], each["OpenVINO"]
        layers = [f"{runtime['integer_layers']} of {each['num_layers']}" for runtime in (ort, openvino)]
        rows.append(
            f"| {each['network']} | {each['bits'].upper()} | {each['num_bytes'] / 1000:,.0f} kB | {layers[0]} "
            f"| **{ort['agreement']:.2f}** | {ort['identical']:.1f} | {each['top1']:.2f}, {ort['top1']:.2f} "
            f"| {layers[1]} | {openvino['agreement']:.2f} | {openvino['top1']:.2f} |\n"
        )
    return "".join(rows)


def litert() -> str:
    """LiteRT files against their students on all test images, and against full precision in time and size."""
    rows = [
        "| network | bits | file, full precision | layers | same class | same logits | top-1 of student, file "
        "| built-in kernels: same class | one image, full precision | |\n",
        "|---|---|---|---|---|---|---|---|---|---|\n",
    ]
    found = _by_network(LITERT)
    for each in found:
        times = [_milliseconds(each["milliseconds"][name]) for name in ("file", "full precision")]
        rows.append(
            f"| {each['network']} | {each['bits'].upper()} | {each['num_bytes'] / 1000:,.0f} kB, "
            f"{each['float_bytes'] / 1000:,.0f} kB | {each['integer_layers']} of {each['num_layers']} "
            f"| **{each['agreement']:.2f}** | {each['identical']:.1f} | {each['top1']['student']:.2f}, "
            f"{each['top1']['file']:.2f} | {each['built_in']['agreement']:.1f} | {times[0]}, {times[1]} "
            f"| **{each['speedup']:.2f}x** |\n"
        )
    machines = sorted({f"Measured on {each['machine']}; ai-edge-litert {each['ai-edge-litert']}.\n" for each in found})
    return "".join(rows) + "\n" + "".join(machines)


def roundings() -> str:
    """Students with the roundings of each target against its kernels."""
    rows = [
        "| network | bits | target | kernels | images | same class | same logits | file | memory |\n",
        "|---|---|---|---|---|---|---|---|---|\n",
    ]
    for found in _by_network(ROUNDINGS):
        for each in found["rows"]:
            memory = f"{each['arena_bytes'] / 1000:,.0f} kB" if "arena_bytes" in each else ""
            rows.append(
                f"| {found['network']} | {found['bits'].upper()} | `{each['target']}` | {each['kernels']} "
                f"| {each['num_images']:,} | {_percent(each['same_class'])} | {_percent(each['same_logits'])} "
                f"| {each['num_bytes'] / 1000:,.0f} kB | {memory} |\n"
            )
    return "".join(rows)


def arm() -> str:
    """Files on emulated ARM processors against the same files here, in percent of images."""
    found = _by_network(ARM)
    names = list(dict.fromkeys(row["kernels"] for each in found for row in each["rows"]))
    rows = [
        f"| network | bits | images | {' | '.join(f'{name}: class, logits' for name in names)} |\n",
        f"|---|---|---|{'---|' * len(names)}\n",
    ]
    for each in found:
        cells = []
        for name in names:
            both = [(row["same_class"], row["same_logits"]) for row in each["rows"] if row["kernels"] == name]
            told = [f"{_percent(same_class)}, {_percent(same_logits)}" for same_class, same_logits in both]
            cells.append(told[0] if len(set(told)) == 1 else "; ".join(told))
        rows.append(f"| {each['network']} | {each['bits'].upper()} | {each['num_images']} | {' | '.join(cells)} |\n")
    emulators = sorted({each["emulator"] for each in found})
    return "".join(rows) + "\n" + "".join(f"{emulator}.\n" for emulator in emulators)


def _by_network(folder: Path) -> list[Result]:
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(found, key=lambda each: (each["network"], ORDER.index(each["bits"])))


def _percent(value: float) -> str:
    """Return a percentage that is 100 only if all are the same."""
    return f"{value:.4g}"
