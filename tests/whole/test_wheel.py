"""What a user gets: wheel and sdist, and the wheel alone in an environment that has nothing else of this project."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

from qimera import __version__

ROOT = Path(__file__).parents[2]


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build the wheel or the sdist of the project in ``source`` and return its path."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the programs of an environment with the wheel, which finds its dependencies where the tests find theirs.

    A .pth file adds a folder, but none of the .pth files in it: an editable install of qimera is not seen.
    """
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    programs = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python")]
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    subprocess.run(install, check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def run(bare: Path, *command: str, folder: Path) -> str:
    """Run a program of the environment in an empty folder and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [bare / command[0], *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    files = contents(wheel)
    information = f"qimera-{__version__}.dist-info"
    assert {name.split("/")[0] for name in files} == {"qimera", information}
    assert {"qimera/py.typed", "qimera/__init__.pyi", "qimera/teacher/weights/mnist_cnn.safetensors"} <= files.keys()
    assert any(name.startswith("qimera/report/templates/") for name in files)
    inside = {f"qimera/{path.relative_to(ROOT / 'src/qimera')}" for path in (ROOT / "src/qimera").rglob("*.py")}
    assert inside <= files.keys()
    assert f"{information}/licenses/LICENSE" in files
    assert sum(map(len, files.values())) < 2_000_000


def test_the_metadata_names_version_python_extras_and_links(wheel: Path) -> None:
    text = contents(wheel)[f"qimera-{__version__}.dist-info/METADATA"].decode()
    assert re.search(rf"^Version: {re.escape(__version__)}$", text, re.MULTILINE)
    assert "Requires-Python: >=3.11" in text
    extras = re.findall(r"^Provides-Extra: (.+)$", text, re.MULTILINE)
    readme = (ROOT / "README.md").read_text()
    assert len(extras) > 6
    assert [extra for extra in extras if extra != "dev" and f"`{extra}`" not in readme] == []
    for url in re.findall(r"^Project-URL: .+, (.+)$", text, re.MULTILINE):
        assert url == "https://arxiv.org/abs/2111.02625"


def test_the_version_is_in_the_changelog() -> None:
    assert f"\n## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_sdist_builds_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert {"tests", "docs", "examples", "benchmarks", "README.md"} <= {path.name for path in source.iterdir()}
    again = build("wheel", source, tmp_path / "wheel")
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


def test_the_wheel_alone_is_a_command_and_a_library(bare: Path, tmp_path: Path) -> None:
    assert run(bare, "qimera", "--version", folder=tmp_path) == f"{__version__}\n"
    assert "10 layers" in run(bare, "qimera", "inspect", "mnist_cnn", folder=tmp_path)
    code = "import qimera; print(qimera.__file__); print(*dir(qimera))"
    file, names = run(bare, "python", "-c", code, folder=tmp_path).splitlines()
    assert Path(file).is_relative_to(bare.parent)
    assert {"synthesize", "quantize", "load", "Student"} <= set(names.split())


@pytest.mark.slow
def test_the_wheel_alone_makes_and_exports_a_student(bare: Path, tmp_path: Path) -> None:
    few = ("--recipe", "ptq", "--set", "synthesis.num_optimized=16", "--set", "direct.num_steps=2")
    run(bare, "qimera", "quantize", "mnist_cnn", "--bits", "w8a8", *few, "--output", "run", folder=tmp_path)
    assert "ONNX Runtime" in run(bare, "qimera", "export", "run", folder=tmp_path)
    assert (tmp_path / "run" / "report.html").is_file()
