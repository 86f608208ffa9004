"""Packages of the distribution -> an emulated ARM machine that runs Python with the runtimes' wheels for aarch64.

On Debian and its relatives alone. ``apt-get download`` brings qemu-user-static and debootstrap, ``dpkg -x`` unpacks
them, debootstrap collects a root folder of arm64, and pip puts wheels for aarch64 into a folder. Everything is kept in
build/arm (half a gigabyte) and nothing is installed. debootstrap wants to be root.
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build" / "arm"

_PACKAGES = ("qemu-user-static", "debootstrap")
_RELEASE, _PYTHON = "bookworm", "3.11"
"""The release of Debian whose Python is the one that runs here, so that both take the same wheels."""

_PLATFORMS = tuple(f"manylinux{each}_aarch64" for each in ("_2_28", "_2_27", "_2_17", "2014"))
_ALL = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_IDENTITIES = {
    "cortex-a53": ("0xd03", _ALL),
    "cortex-a76": ("0xd0b", f"{_ALL} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"),
}
"""Part number and features by which libraries choose their kernels. The A76 alone has dot products (asimddp)."""

CPUS = tuple(_IDENTITIES)


class NotAvailableError(Exception):
    """The emulated machine cannot be had here; the message says why."""


def prepare(wheels: tuple[str, ...]) -> str:
    """Download what is missing and return the emulator's name and version.

    Args:
        wheels: Distributions that emulated Python needs, in the versions that are installed here.

    Raises:
        NotAvailableError: a tool or a package is missing.
    """
    if sys.version_info[:2] != (3, 11):
        raise NotAvailableError(f"needs Python {_PYTHON}, as Debian {_RELEASE} has it, to run the same versions")
    missing = [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]
    if missing:
        raise NotAvailableError(f"needs {' and '.join(missing)}, so Debian or a relative")
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not (FOLDER / "tools").exists():
        _run("apt-get", "download", *_PACKAGES)
        for package in FOLDER.glob("*.deb"):
            _run("dpkg", "-x", package.name, "tools.part")
        (FOLDER / "tools.part").rename(FOLDER / "tools")
    if not (FOLDER / "root").exists():
        _collect_root()
    wanted, there = "\n".join(f"{name}=={version(name)}" for name in wheels), FOLDER / "site" / "wheels.txt"
    if not there.exists() or there.read_text() != wanted:
        platforms = [f"--platform={each}" for each in _PLATFORMS]
        arguments = [
            "--target",
            "site.part",
            "--python-version",
            _PYTHON,
            "--only-binary=:all:",
            *platforms,
            *wanted.split(),
        ]
        _run(sys.executable, "-m", "pip", "install", "--quiet", *arguments)
        shutil.rmtree(FOLDER / "site", ignore_errors=True)
        (FOLDER / "site.part").rename(FOLDER / "site")
        there.write_text(wanted)
    return _run(str(_emulator()), "--version").splitlines()[0]


def _collect_root() -> None:
    """Download Debian's packages for arm64, of Python and what it needs, and unpack them."""
    shutil.rmtree(FOLDER / "root.part", ignore_errors=True)
    collect = FOLDER / "tools" / "usr" / "sbin" / "debootstrap"
    options = ["--arch=arm64", "--foreign", "--variant=minbase", "--include=python3"]
    _run(str(collect), *options, _RELEASE, "root.part")
    for package in sorted((FOLDER / "root.part" / "var" / "cache" / "apt" / "archives").glob("*.deb")):
        _run("dpkg", "-x", str(package), "root.part")
    (FOLDER / "root.part").rename(FOLDER / "root")


def run_emulated(cpu: str, script: Path, *arguments: str) -> None:
    """Run a Python script on the emulated processor, with one thread."""
    part, features = _IDENTITIES[cpu]
    identity = (
        f"processor\t: 0\nBogoMIPS\t: 100.00\nFeatures\t: {features}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: {part}\nCPU revision\t: 4\n\n"
    )
    information = FOLDER / "root" / "proc" / "cpuinfo"  # ONNX Runtime crashes where it does not fit the processor
    information.parent.mkdir(exist_ok=True)
    information.write_text(identity)
    python = FOLDER / "root" / "usr" / "bin" / f"python{_PYTHON}"
    _run(str(_emulator()), "-cpu", cpu, "-L", str(FOLDER / "root"), str(python), str(script), *arguments)


def _emulator() -> Path:
    return FOLDER / "tools" / "usr" / "bin" / "qemu-aarch64-static"


def _run(*command: str) -> str:
    """Run a command in the folder and return what it prints."""
    found = {
        "PYTHONPATH": str(FOLDER / "site") if "-L" in command else "",
        "DEBOOTSTRAP_DIR": str(FOLDER / "tools" / "usr" / "share" / "debootstrap"),
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
    }
    result = subprocess.run(command, cwd=FOLDER, env=os.environ | found, capture_output=True, text=True, check=False)
    if result.returncode:
        said = (result.stderr or result.stdout).strip().splitlines()
        raise NotAvailableError(f"{' '.join(command[:3])}: {said[-1] if said else result.returncode}")
    return result.stdout
