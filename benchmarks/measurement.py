"""What every benchmark of accuracy shares: its subject, and how a result is kept."""

import argparse
import json
import platform
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.zoo import load_subject
from qimera import LabelledImages, Teacher, evaluate
from qimera.machine.allocator import reuse_freed_memory

BANKS = Path(__file__).parent / ".banks"
"""Where banks are kept between benchmarks."""

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
"""Those that decide on the speed of integers."""

FULL_PRECISION = Path(__file__).parent / "accuracy" / "results" / "full_precision"


def prepare(options: argparse.Namespace) -> tuple[Teacher, LabelledImages, float]:
    """Return ``options.network``, the images that score it, and its top-1 in full precision.

    From here on torch has ``options.threads`` threads, and libraries keep their warnings to themselves.
    """
    torch.set_num_threads(options.threads)
    reuse_freed_memory()  # as the command line does
    warnings.simplefilter("ignore")
    teacher, images = load_subject(options.network)
    return teacher, images, _full_precision(options.network, teacher, images)


def _full_precision(network: str, teacher: Teacher, images: LabelledImages) -> float:
    """Return the teacher's top-1, measured once and kept."""
    path = FULL_PRECISION / f"{network}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        top1 = evaluate(teacher, images, teacher.input_spec).top1
        path.write_text(json.dumps({"network": network, "full_precision": top1, "num_images": len(images)}) + "\n")
    return float(json.loads(path.read_text())["full_precision"])


def without_result(names: Iterable[str], path_of: Callable[[str], Path]) -> list[str]:
    """Return those that have no result yet, and say which have one."""
    there = {name: path_of(name) for name in names}
    for name, path in there.items():
        if path.exists():
            print(f"{path}: {name} is measured already; remove the file to measure it again", flush=True)
    return [name for name, path in there.items() if not path.exists()]


def device_name(device: str) -> str:
    """Return what a result says of the device that trained it."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def command_line() -> str:
    """Return the command that started this program."""
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]
    return shlex.join(["python", *program, *sys.argv[1:]])


def keep(path: Path, values: dict[str, object], said: str) -> None:
    """Write a result with where, when and by which command it was made, and say what it came to."""
    made = {
        "threads": torch.get_num_threads(),
        "machine": machine_name(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "command": command_line(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values | made, indent=2) + "\n")
    print(f"{path.name}: {said}", flush=True)


def machine_name() -> str:
    """Return the processor's name and those of its instruction sets that decide on the speed of integers."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.+)$", text, re.MULTILINE)
    there = [each for each in INSTRUCTION_SETS if flags is not None and each in flags[1].split()]
    return ", ".join([name[1] if name is not None else platform.processor() or platform.machine(), *there])
