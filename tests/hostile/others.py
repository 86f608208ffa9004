"""Reads the hostile files that are no networks while an audit hook watches; started by test_hostile.py.

    python -m tests.hostile.others

Prints one line of JSON as reading.py does.
"""

import json
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from qimera.errors import QimeraError
from qimera.teacher.teacher import Teacher
from tests.hostile.archives import Tiny
from tests.hostile.audit import watched
from tests.hostile.files import Case, cases
from tests.hostile.reading import SPEC, Result

_LAZY = re.compile(
    r"import '(torch|numpy|PIL|encodings|qimera|_)|marshal\.loads|exec (/|<string>)|compile |object\.__setattr__"
)
"""What else happens when a module is imported for the first time."""


def read(path: Path, case: Case) -> tuple[bool, list[str]]:
    """Return whether a file was read, and what is wrong with how that ended."""
    content, reader = case
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    faults: list[str] = []
    was_read = False
    with watched() as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader(path)
            was_read = True
        except QimeraError as error:
            faults += [] if str(error).strip() else ["no message"]
        except BaseException as error:
            faults.append(f"{type(error).__name__}: {error!s:.200}")
    faults += seen
    if Path("executed").exists():
        faults.append("code in the file was executed")
        Path("executed").unlink() if Path("executed").is_file() else Path("executed").rmdir()
    return was_read, faults


def main() -> Result:
    """Read every file twice; what is imported when it is needed comes in at first."""
    teacher = Teacher.capture(Tiny().eval(), SPEC)
    result = Result()
    found = cases(teacher)
    for turn in range(2):
        for name, case in found.items():
            was_read, faults = read(Path(name).resolve(), case)
            if turn == 0:
                faults = [each for each in faults if not _LAZY.match(each)]
            result.read += was_read
            result.refused += not was_read
            result.faults += [f"{name}: {fault}" for fault in faults]
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.stdout.write(json.dumps(vars(main())) + "\n")
        os.chdir("/")
