"""Reads hostile files while an audit hook watches; started by test_hostile.py, for the hook stays as long as a process.

    python -m tests.hostile.reading archives|teachers STEP SEED COUNT ...

Reads every STEP-th file made by hand (the first if it is 0), and COUNT random ones from SEED on; then those of the next
four words. Prints one line of JSON for each: how many files were refused and read, and what went wrong with which.
"""

import json
import os
import random
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

# torch's arithmetic on sizes imports it when some sizes are compared
import sympy.sets.setexpr  # noqa: F401
import torch
from torch.fx import GraphModule

from qimera.config.input_spec import InputSpec
from qimera.errors import QimeraError
from qimera.graph.operations import operation_name
from qimera.teacher.exported_programs import read_program
from qimera.teacher.teacher import Teacher
from tests.hostile import archives as made_archives, graphs, teachers as made_teachers, tensors
from tests.hostile.archives import SHAPE, Archive, Tiny
from tests.hostile.audit import watched
from tests.hostile.audit_sources import strange_code
from tests.hostile.changes import mutate_archive, mutate_teacher
from tests.hostile.teachers import TeacherFile

SPEC = InputSpec(shape=SHAPE, mean=(0.5,) * 3, std=(0.25,) * 3)
SECONDS, MEMORY = 20.0, 6 << 30
"""Most that one file may take, and the process more than it has after the good one."""

_AT_FIRST = ("compile <string>", "exec <string>")

ARCHIVES = {**made_archives.KINDS, **tensors.KINDS, **graphs.KINDS}
TEACHERS = made_teachers.KINDS


@dataclass
class Result:
    """What came of a number of files."""

    refused: int = 0
    read: int = 0
    faults: list[str] = field(default_factory=list)


class TooLong(BaseException):
    """Not an Exception: a reader may turn any of those into a message."""


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise TooLong(f"takes more than {SECONDS} seconds")


def read(path: Path, reader: Callable[[Path], GraphModule]) -> tuple[bool, list[str]]:
    """Return whether a file was read, and what is wrong with how that ended."""
    faults: list[str] = []
    network: GraphModule | None = None
    with watched() as seen:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            network = reader(path)
        except QimeraError as error:
            faults += [] if str(path) in str(error) else [f"the message names no file: {error!s:.200}"]
        except BaseException as error:
            faults.append(f"{type(error).__name__}: {error!s:.200}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    faults += seen
    if Path("executed").exists():
        Path("executed").rmdir()
        faults.append("code in the file was executed")
    return network is not None, faults + list(_harm_of(network) if network else ())


def _harm_of(network: GraphModule) -> Iterator[str]:
    """Yield what a network could do beyond operations on tensors; it is called with images, whatever it returns."""
    for node in network.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output") and operation_name(node.target) is None:
            yield f"calls {node.op} {node.target}"
    if strange := strange_code(network.code):
        yield f"generated code: {strange}"
    with watched() as seen:
        try:
            network(torch.zeros(2, *SHAPE))
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
            return  # what does not fit together is found when a network is captured
        except BaseException as error:
            yield f"when called: {type(error).__name__}: {error!s:.200}"
    yield from seen


def archives(step: int, seeds: range) -> Iterator[tuple[str, Archive]]:
    """Yield the good archive, and archives of every kind or random ones."""
    good = Archive.good()
    yield from (("good", good) for _ in range(2))
    for name, change in list(ARCHIVES.items())[:: step or len(ARCHIVES)]:
        archive = good.copy()
        change(archive)
        yield name, archive
    for seed in seeds:
        archive = good.copy()
        mutate_archive(archive, random.Random(seed))
        yield f"random, seed {seed}", archive


def teachers(step: int, seeds: range) -> Iterator[tuple[str, TeacherFile]]:
    """Yield the file of a good teacher, and files of every kind or random ones."""
    Teacher.capture(Tiny().eval(), SPEC).save("good.safetensors")
    content = Path("good.safetensors").read_bytes()
    yield from (("good", TeacherFile.of(content)) for _ in range(2))
    for name, change in list(TEACHERS.items())[:: step or len(TEACHERS)]:
        file = TeacherFile.of(content)
        change(file)
        yield name, file
    for seed in seeds:
        file = TeacherFile.of(content)
        mutate_teacher(file, random.Random(seed))
        yield f"random, seed {seed}", file


def main(files: Iterator[tuple[str, Archive | TeacherFile]], reader: Callable[[Path], GraphModule]) -> Result:
    """Read all files; the first two are good and bring in what is imported when it is needed."""
    signal.signal(signal.SIGALRM, _stop)
    result, path = Result(), Path("file").resolve()
    for number, (name, file) in enumerate(files):
        file.write(path)
        was_read, faults = read(path, reader)
        if faults:  # torch resolves its own annotations when an operation is first used: that does not come twice
            again = read(path, reader)[1]
            faults = [each for each in faults if each in again or not each.startswith(_AT_FIRST)]
        if number == 0:
            assert was_read
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
            continue
        result.read += was_read
        result.refused += not was_read
        result.faults += [f"{name}: {fault}" for fault in faults]
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for first in range(1, len(sys.argv), 4):
            what, step, seed, count = sys.argv[first], *map(int, sys.argv[first + 1 : first + 4])
            seeds = range(seed, seed + count)
            if what == "archives":
                found = main(archives(step, seeds), read_program)
            else:
                found = main(teachers(step, seeds), lambda path: Teacher.load(path, SPEC).module)
            sys.stdout.write(json.dumps(vars(found)) + "\n")
        os.chdir("/")
