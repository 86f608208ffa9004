"""Programs beside the tests, for what the type checks of the test run would be in the way of."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def result_of(program: str, *arguments: str) -> dict[str, Any]:
    """Return what a program prints last: an object in JSON."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", program, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), os.environ.get("PYTHONPATH", "")])}
    output = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))
