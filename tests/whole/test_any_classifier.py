"""Architectures of others, and three of the kind that users bring, through every stage."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from typer.testing import Result

from benchmarks.coverage.coverage import examine, reason_against
from qimera.student import rounding
from tests.command_line import INPUT, qimera, write_model_file

USERS_FILE = '''
import torch
from torch import nn
from torch.nn import functional as F


class TwoAnswers(nn.Module):
    """Logits of an auxiliary head, then a dictionary with those that count."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True))
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(True))
        self.auxiliary = nn.Linear(8, 4)
        self.head = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 4))

    def forward(self, x):
        x = self.stem(x)
        auxiliary = self.auxiliary(x.mean((2, 3)))
        return auxiliary, {"logits": self.head(F.adaptive_avg_pool2d(self.body(x), 1).flatten(1)), "features": x}


class WideBlock(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(width, out, 1, stride, bias=False) if width != out else None

    def forward(self, x):
        y = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y))))


class WideResNet(nn.Module):
    """Pre-activation, as Zagoruyko and Komodakis have it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(WideBlock(8, 16, 2), WideBlock(16, 16, 1))
        self.bn, self.fc = nn.BatchNorm2d(16), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(F.avg_pool2d(F.relu(self.bn(self.blocks(self.conv(x)))), 4).flatten(1))


class Gate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1)

    def forward(self, x):
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


class Scan(nn.Module):
    """One channel, neither square nor even, hard-swish and squeeze-and-excitation."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(),
            nn.Conv2d(8, 8, 5, 2, 2, groups=8, bias=False), nn.BatchNorm2d(8), nn.Hardswish(), Gate(8),
            nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(),
        )
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3), keepdim=True)).squeeze(-1).squeeze(-1)


def calibrated(model, *shape):
    torch.manual_seed(0)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = None
    with torch.no_grad():
        model.train()(F.interpolate(torch.randn(64, shape[0], 8, 8), shape[1:], mode="bilinear"))
    return model.eval()


def two_answers():
    return calibrated(TwoAnswers(), 3, 12, 12)


def wide_resnet():
    return calibrated(WideResNet(), 3, 8, 8)


def scan():
    return calibrated(Scan(), 1, 29, 45)
'''

OF_USERS = {
    "two_answers": ((3, 12, 12), ("--logits", "1.logits"), 4),
    "wide_resnet": ((3, 8, 8), (), 4),
    "scan": ((1, 29, 45), (), 3),
}


FEW = ("--recipe", "ptq", "--set", "synthesis.num_optimized=32", "--set", "direct.num_steps=4")
"""No training, and samples that are made in a second."""


@pytest.mark.parametrize("name", OF_USERS)
def test_a_users_own_network_goes_from_inspect_to_export(tmp_path: Path, name: str) -> None:
    shape, more, num_classes = OF_USERS[name]
    (tmp_path / "nets.py").write_text(USERS_FILE)
    numbers = ",".join(["0.5"] * shape[0])
    options = (f"{tmp_path}/nets.py:{name}", *more, "--input-shape", ",".join(map(str, shape)))
    options += ("--mean", numbers, "--std", numbers)
    inspected = done(qimera("inspect", *options))
    assert f"{num_classes}, from" in inspected.stdout
    done(qimera("quantize", *options, "--bits", "w8a8", *FEW, "--output", tmp_path / "run"))
    pixels = np.random.default_rng(0).integers(0, 256, (12, *shape[1:], shape[0]), np.uint8)
    np.savez(tmp_path / "data.npz", images=pixels, labels=np.arange(12) % num_classes)
    evaluated = done(qimera("evaluate", tmp_path / "run", "--data", tmp_path / "data.npz"))
    assert "agreement" in evaluated.stdout
    exported = done(qimera("export", tmp_path / "run"))
    assert (tmp_path / "run" / "student.onnx").exists()
    assert "in floating point" not in exported.stdout


def test_outputs_that_could_both_be_the_logits_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(USERS_FILE.replace('"logits":', '"answer":'))
    options = ("--input-shape", "3,12,12", "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5")
    refused = qimera("inspect", f"{tmp_path}/nets.py:two_answers", *options)
    assert refused.exit_code == 3
    assert "choose one of 0, 1.answer with --logits" in refused.stderr


def test_a_network_without_batch_norms_gets_a_student_and_no_estimate(tmp_path: Path) -> None:
    model, run = f"{write_model_file(tmp_path)}:build_without_batch_norm", tmp_path / "run"
    done(qimera("quantize", model, *INPUT, *FEW, "--output", run))
    again = done(qimera("quantize", "--settings", run / "settings.json", "--output", tmp_path / "again"))
    assert "estimate" in again.stdout


def done(result: Result) -> Result:
    assert result.exit_code == 0, result.stderr
    return result


FEW_LAYERS = {
    "timm:test_efficientnet": "SiLU and stochastic depth",
    "mobilenet_of_tensorflow": "padding as TensorFlow does it",
    "resnet_v2": "norms before convolutions, a 1x1 convolution as classifier",
    "GoogLeNet": "inception blocks, pooling with ceil, unused auxiliary heads",
    "shufflenet_v2": "channel split and shuffle",
    "mobilenet_v3": "a head of two linear layers, writing in place",
}
"""Architectures whole, and those of small_architectures.py."""
OF_LIBRARIES = {
    "timm:tf_mobilenetv3_small_minimal_100": "padding as TensorFlow does it",
    "timm:resnetv2_18": "norms before convolutions, a 1x1 convolution as classifier",
    "timm:legacy_seresnet18": "squeeze-and-excitation by linear layers, residual additions",
    "timm:mobilenetv3_small_050": "depthwise, hard-swish, a batch norm subclass with an activation inside",
    "timm:skresnet18": "dilated convolutions and attention between branches",
    "timm:dla46x_c": "grouped convolutions and concatenations in a tree",
    "timm:repvit_m0_9": "GELU, and a norm before the classifier",
    "timm:ghostnet_050": "slices and cheap branches",
    "timm:mobilenetv4_conv_small": "no squeeze-and-excitation, odd kernels",
    "timm:hardcorenas_a": "searched blocks",
    "torchvision:googlenet": "inception blocks, pooling with ceil, unused auxiliary heads",
    "torchvision:shufflenet_v2_x0_5": "channel split and shuffle",
    "torchvision:mobilenet_v3_small": "a head of two linear layers, writing in place",
    "torchvision:regnet_x_400mf": "grouped bottlenecks",
}


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.filterwarnings("ignore")  # of libraries that are not ours
@pytest.mark.parametrize(
    ("source", "size"),
    [
        *((source, 32) for source in FEW_LAYERS),
        *(pytest.param(source, 64, marks=pytest.mark.slow) for source in OF_LIBRARIES),
    ],
)
def test_an_architecture_of_a_library_passes_every_stage(
    monkeypatch: pytest.MonkeyPatch, source: str, size: int
) -> None:
    monkeypatch.setattr(rounding, "_MAX_INPUTS", rounding._MAX_INPUTS)  # which examine changes
    own = Path(__file__).parents[1] / "small_architectures.py"
    assert reason_against(examine(source if ":" in source else f"{own}:{source}", size)) == ""
