import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest

import qimera

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_importable_and_documented() -> None:
    assert qimera.__all__ == sorted(qimera.__all__)
    assert len(qimera.__all__) > 40
    for name in qimera.__all__:
        value = getattr(qimera, name)
        assert isinstance(value, tuple) or value.__doc__, f"{name} has no docstring"


def test_the_package_says_its_version_and_lists_its_names() -> None:
    assert qimera.__version__ == version("qimera")
    assert {"synthesize", "quantize", "load", "load_model", "export_executorch", "Student"} <= set(dir(qimera))


def test_importing_the_package_needs_the_core_libraries_alone() -> None:
    optional = "{'onnx', 'onnxruntime', 'openvino', 'timm', 'torchvision', 'matplotlib', 'mlxtend', 'huggingface_hub'}"
    assert python(f"import sys, qimera, qimera.cli.app; print({optional} & sys.modules.keys())") == "set()\n"


def test_the_command_line_answers_help_without_loading_torch() -> None:
    assert python("import sys, qimera.cli.app; print('torch' in sys.modules)") == "False\n"


def test_the_installed_command_says_its_version() -> None:
    command = Path(sys.executable).with_name("qimera")
    if not command.exists():
        pytest.skip("qimera is not installed here; `make test` installs it")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{qimera.__version__}\n"


def test_the_package_carries_its_weights_and_its_type_marker() -> None:
    package = files("qimera")
    assert package.joinpath("py.typed").is_file()
    weights = [each for each in package.joinpath("teacher", "weights").iterdir() if each.name.endswith(".safetensors")]
    assert weights
    for each in weights:
        assert 0 < len(each.read_bytes()) < 500_000


def test_the_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if not line.startswith("#")}
    extras = [each for extra in PROJECT["optional-dependencies"].values() for each in extra]
    needed = {requirement.split(">=")[0].lower() for requirement in [*PROJECT["dependencies"], *extras]}
    assert needed <= pinned


@pytest.mark.parametrize("path", sorted(ROOT.glob("src/qimera/**/*.py")), ids=lambda path: path.name)
def test_a_module_opens_with_one_sentence_and_stays_short(path: Path) -> None:
    lines = path.read_text(encoding="ascii").splitlines()
    assert lines
    assert lines[0].startswith('"""')
    assert len(lines) < 350
