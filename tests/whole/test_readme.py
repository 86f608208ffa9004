import re
import shlex
from glob import glob
from pathlib import Path

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession
from safetensors.torch import save_file
from typer.testing import CliRunner

from qimera.cli.app import app
from qimera.config.settings import DirectSettings, DistillationSettings, SynthesisSettings
from qimera.export.comparison import Verification
from qimera.student.student import Student
from qimera.teacher.libraries import build
from tests.command_line import INPUT, SMALL

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

FEW = ("--set", "synthesis.num_optimized=16", "--set", "direct.num_steps=2")

RESNET = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(features, nn.Flatten(), nn.Linear(4, 10))
"""


def block(language: str, containing: str) -> str:
    """Return the one fenced block of this language that contains the text."""
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in text]
    assert len(found) == 1
    return found[0]


def commands() -> list[list[str]]:
    """Return the command lines of the README, split as a shell would."""
    return typed_in(block("sh", "qimera inspect"))


def typed_in(text: str) -> list[list[str]]:
    """Return the command lines of a fenced block, split as a shell would."""
    return [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the lengths of the two stages are cut short."""
    text = block("python", "qimera.synthesize")
    short = text.replace("synthesize(model, spec)", "synthesize(model, spec, SYNTHESIS)")
    short = short.replace('bits="w4a4")', 'bits="w4a4", settings=DISTILLATION)')
    assert short.count("SYNTHESIS") == short.count("DISTILLATION") == 1
    names: dict[str, object] = {
        "SYNTHESIS": SynthesisSettings(num_optimized=4, direct=DirectSettings(num_steps=2)),
        "DISTILLATION": DistillationSettings(num_steps=2),
    }
    monkeypatch.chdir(tmp_path)
    exec(short, names)
    student, verification = names["student"], names["verification"]
    assert isinstance(student, Student)
    assert isinstance(verification, Verification)
    images = torch.zeros(2, 1, 28, 28)
    (logits,) = InferenceSession(tmp_path / "mnist_cnn.onnx").run(None, {"input": images.numpy()})
    with torch.no_grad():
        assert np.allclose(logits, student(images).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    "recipe", [("--recipe", "ptq", *FEW), pytest.param((), marks=pytest.mark.slow)], ids=["ptq", "typed"]
)
def test_the_commands_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: tuple[str, ...]
) -> None:
    """Every command as it is typed, on a network of a few hundred parameters; by default with little to do."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet.py").write_text(RESNET)
    namespace: dict[str, object] = {}
    exec(RESNET, namespace)
    build = namespace["build"]
    assert callable(build)
    save_file(build().state_dict(), tmp_path / "resnet.safetensors")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(20) % 10)
    typed = commands()
    verbs = ("inspect", "quantize", "export", "evaluate", "compare", "recipes")
    assert [line[:2] for line in typed] == [["qimera", verb] for verb in verbs]
    for line in typed:
        more = recipe if line[1] == "quantize" else ()
        result = CliRunner().invoke(app, [part for word in line[1:] for part in (glob(word) or [word])] + [*more])
        assert result.exit_code == 0, (line, result.output)


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command as it is typed, and the Python between them."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (20, 28, 28, 1), dtype=np.uint8)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(20) % 10)
    blocks = re.findall(r"```(sh|python)\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL)
    assert [language for language, _ in blocks] == ["sh", "sh", "sh", "sh", "python", "sh"]
    for language, text in blocks:
        if language == "python":
            exec(text, {})
        for line in typed_in(text) if language == "sh" else []:
            result = CliRunner().invoke(app, line[1:])
            assert result.exit_code == 0, (line, result.output)
    assert "Same class as full precision" in (tmp_path / "runs" / "digits" / "report.html").read_text()


def test_every_file_that_the_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120
    assert README.index("torchvision:resnet18") < len("\n".join(README.splitlines()[:40]))


@pytest.mark.parametrize(
    "model",
    [
        " ".join((SMALL, *INPUT)),
        pytest.param(
            "torchvision:resnet18 --weights resnet18.pth", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]
        ),
    ],
    ids=["small", "typed"],
)
def test_the_commands_for_a_torchvision_network_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """By default on a network of three layers and few samples, else with random weights, of which a run warns."""
    monkeypatch.chdir(tmp_path)
    typed = block("sh", "torchvision:resnet18").replace("torchvision:resnet18 --weights resnet18.pth", model)
    is_small = model.startswith(SMALL)
    side, channels, classes = (8, 1, 10) if is_small else (224, 3, 1000)
    if not is_small:
        torch.save(build("torchvision", "resnet18", None).state_dict(), "resnet18.pth")
    images = np.random.default_rng(0).integers(0, 256, (20, side, side, channels), dtype=np.uint8)
    np.savez("val.npz", images=images, labels=np.arange(20) % classes)
    few = FEW if is_small else ()
    for line in typed_in(typed):
        result = CliRunner().invoke(app, [*line[1:], *(few if line[1] == "quantize" else ())])
        assert result.exit_code == 0, (line, result.output)
    assert (tmp_path / "runs/resnet18/student.onnx").is_file()
