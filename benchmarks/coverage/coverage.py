"""Architectures of timm, torchvision and pytorchcv through every stage: one table, docs/coverage.md, resumable.

    python -m benchmarks.coverage.coverage                  # everything that has no result yet, then the table
    python -m benchmarks.coverage.coverage --again timm:resnet18

Each goes the way of a user: a bank, first integers as recipe ptq finds them, one training step on block outputs, and a
verified ONNX file. Weights are random and batch-norm statistics those of one pass of smooth noise; scales and shifts of
batch norms are drawn such that activations stay mostly linear, since deep random networks amplify every rounding error
otherwise. Networks without batch norms, and those with layer norms, get weights with which every block counts.
"""

import argparse
import json
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.coverage.architectures import ARCHITECTURES, PYTORCHCV, SIZED
from qimera import (
    DirectSettings,
    DistillationSettings,
    InputSpec,
    QimeraError,
    SynthesisSettings,
    Teacher,
    export_onnx,
    quantize,
    synthesize,
)
from qimera.graph.folding import fold_batch_norms
from qimera.graph.nodes import batch_norms
from qimera.student import rounding
from qimera.synthesis.direct import noise_images
from qimera.teacher.logits import choose_logits
from qimera.teacher.sources import load_model

RESULTS = Path(__file__).parent / "results.json"
TABLE = Path(__file__).parents[2] / "docs" / "coverage.md"
SYNTHESIS = SynthesisSettings(
    num_optimized=28, num_held_out=12, direct=DirectSettings(num_steps=4, batch_size=28, num_scales=5)
)
DISTILLATION = DistillationSettings(num_steps=1, start="compensated", batch_size=8)
_MAX_INPUTS = 1152
"""Inputs of one output from which layers keep their nearest integers; elsewhere 8,192, which would take days here."""

_LEAST_VARIANCE = 0.1
"""Of a channel, as a share of the mean of its layer: random weights leave some constant, which training does not."""

_EMBEDDING_STD = 0.5
"""Of class tokens and embeddings of positions, beside tokens of about 1."""

MAX_FOLDING_ERROR, MIN_CORRELATION, MIN_AGREEMENT = 1e-4, 0.9, 90.0


def main() -> None:
    """Compute what is missing and write the table."""
    options = _options()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    missing = [source for source in ARCHITECTURES if source not in results or source in options.again]
    print(f"{len(results)} of {len(ARCHITECTURES)} have a result; {len(missing)} to go (--again NAME measures anew)")
    with get_context("spawn").Pool(options.processes, maxtasksperchild=8) as pool:
        for source, result in pool.imap_unordered(_examined, missing):
            results[source] = result
            RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
            print(time.strftime("%H:%M:%S"), source, reason_against(result) or "passes", flush=True)
    TABLE.write_text(table(results))


def _examined(source: str) -> tuple[str, dict[str, object]]:
    return source, examine(source, ARCHITECTURES[source])


def examine(source: str, size: int) -> dict[str, object]:
    """Return what becomes of an architecture; ``reason_against`` it says why not all of it passes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rounding._MAX_INPUTS = _MAX_INPUTS
    found: dict[str, object] = {"size": size}
    start = time.monotonic()
    try:
        _examine(source, size, found)
    except QimeraError as error:
        found["refusal"] = str(error)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        found["fault"] = f" {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def _examine(source: str, size: int, found: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = _model(source, size)
    channels = 3
    spec = InputSpec(shape=(channels, size, size), mean=(0.5,) * channels, std=(0.25,) * channels)
    images = [_noise(spec, seed) for seed in (0, 1)]
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    found["batch_norms"] = calibrate_(model, images[0])
    teacher = Teacher.capture(model, spec)
    found["taps"], found["layers"] = len(teacher.batch_norms), len(teacher.layers)
    if found["taps"] != found["batch_norms"]:
        found["batch_norms"] = _num_norms_behind_logits(model, spec)
    del model
    folded = fold_batch_norms(teacher.module)
    found["exact_batch_norms"] = len(batch_norms(folded))
    with torch.no_grad():
        logits = teacher(images[1])
        found["folding_error"] = float((folded(images[1]) - logits).abs().max() / logits.abs().max())
    del folded
    bank = synthesize(teacher, settings=SYNTHESIS)
    student = quantize(teacher, bank, "w8a8", settings=DISTILLATION)
    found["correlation"] = _correlation(student(bank.held_out.images), bank.held_out.logits)
    with tempfile.TemporaryDirectory() as folder:
        file = export_onnx(student, Path(folder) / "student.onnx", bank, min_agreement=0.0)
    onnx_runtime = file.comparisons[0]
    found["agreement"], found["identical"] = onnx_runtime.agreement, onnx_runtime.identical
    found["integer_layers"], found["quantized_layers"] = onnx_runtime.integer_layers, file.num_layers
    found["float_layers"] = onnx_runtime.float_layers[:4]


def _model(source: str, size: int) -> nn.Module:
    """Return a network of random weights, for images of ``size`` and 1,000 classes where its library lets choose."""
    library, _, name = source.partition(":")
    model = load_model(f"{PYTORCHCV[name]}:{name}" if library == "pytorchcv" else source, untrained=True)
    if library != "timm" or name not in SIZED:
        return model
    torch.manual_seed(0)
    return sys.modules["timm"].create_model(name, img_size=size, num_classes=1000)


def reason_against(found: dict[str, object]) -> str:
    """Return why an architecture does not pass every column; empty if it does."""
    ended = found.get("fault") or found.get("refusal")
    return str(ended) if ended else "; ".join(text for text, passed in _criteria(found).items() if not passed)


def _criteria(found: dict[str, object]) -> dict[str, bool]:
    return {
        f"{found['taps']} of {found['batch_norms']} batch norms tapped": found["taps"] == found["batch_norms"],
        f"folding changes logits by {found['folding_error']:.0e}": found["folding_error"] <= MAX_FOLDING_ERROR,
        f"student correlates by {found['correlation']:.2f} only": found["correlation"] >= MIN_CORRELATION,
        f"file and student agree on {found['agreement']:.0f} % only": found["agreement"] >= MIN_AGREEMENT,
        f"in floating point: {', '.join(found['float_layers'])}": not found["float_layers"],
    }


def _num_norms_behind_logits(model: nn.Module, spec: InputSpec) -> int:
    """Return how many batch norms the logits depend on, counted by the gradients that reach them."""
    scales = [norm.weight for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.weight is not None]
    for scale in scales:
        scale.requires_grad_(True)
    output = model(_noise(spec, 0)[:2])
    logits = choose_logits(output, 2, "", type(model).__name__).logits_of(output)
    logits.sum().backward()
    return sum(scale.grad is not None for scale in scales)


def _noise(spec: InputSpec, seed: int) -> Tensor:
    num_images = 32 if spec.shape[1] < 160 else 12
    return noise_images(num_images, spec.shape, 5, torch.Generator().manual_seed(seed))


def calibrate_(model: nn.Module, images: Tensor) -> int:
    """Draw what a network learns, let batch norms record ``images``, and return how many of these took part."""
    rng = torch.Generator().manual_seed(0)
    kinds = {type(module) for module in model.modules()}
    if not any(issubclass(kind, _BatchNorm) for kind in kinds) or any(issubclass(kind, nn.LayerNorm) for kind in kinds):
        _draw_small_parameters_(model, rng)
    called: set[nn.Module] = set()
    note: Callable[..., None] = lambda module, *_: called.add(module)  # noqa: E731
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for norm in norms:
        norm.register_forward_pre_hook(note)
        norm.train()
        norm.momentum = None
        norm.reset_running_stats()
        if norm.weight is not None:
            nn.init.uniform_(norm.weight, 0.5, 1.5, generator=rng)
            nn.init.normal_(norm.bias, 1.0, 0.3, generator=rng)
    with torch.no_grad():
        model(images)
    model.eval()
    for norm in norms:
        norm._forward_pre_hooks.clear()
        if norm.running_var is not None and norm in called:
            norm.running_var.clamp_(min=_LEAST_VARIANCE * float(norm.running_var.mean()))
    return len(called)


@torch.no_grad()
def _draw_small_parameters_(model: nn.Module, rng: torch.Generator) -> None:
    """Draw anew what libraries start so small that a block does next to nothing, or at one number.

    Layer scales begin at 1e-6, many weights and class tokens at 0.02; trained ones are larger. Weights that are smaller
    get variance 1 / inputs, tokens and embeddings of positions a standard deviation of 0.5. Of what is the same number
    everywhere, scales lie between 0.5 and 1.5, and zeros get a standard deviation of 0.1.
    """
    of_norms = {id(each) for norm in model.modules() if isinstance(norm, _BatchNorm) for each in norm.parameters()}
    weights = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)}
    for name, parameter in model.named_parameters():
        value = float(parameter.flatten()[0])
        if id(parameter) in of_norms:
            continue
        if id(parameter) in weights:
            std = parameter[0].numel() ** -0.5
            if parameter.std() < std:
                nn.init.normal_(parameter, std=std, generator=rng)
        elif re.search("token|pos|table", name.rpartition(".")[2]):
            if parameter.std() < _EMBEDDING_STD:
                nn.init.normal_(parameter, std=_EMBEDDING_STD, generator=rng)
        elif bool((parameter == value).all()):
            if value == 0 and parameter.ndim:
                nn.init.normal_(parameter, std=0.1, generator=rng)
            else:
                nn.init.uniform_(parameter, 0.5, 1.5, generator=rng).mul_(1.0 if abs(value) < 0.1 else value)


def _correlation(student: Tensor, teacher: Tensor) -> float:
    """Return how the logits of both vary together from image to image."""
    both = torch.stack([(each - each.mean(0)).flatten() for each in (student, teacher)])
    return float(torch.corrcoef(both)[0, 1])


def table(results: dict[str, dict[str, object]]) -> str:
    """Return docs/coverage.md."""
    passing = sum(not reason_against(each) for each in results.values())
    without = {source: each for source, each in results.items() if not each.get("batch_norms", 1)}
    passing_without = sum(not reason_against(each) for each in without.values())
    lines = [
        "# Architectures",
        "",
        f"{passing} of {len(results)} architectures pass every column, {passing_without} of the {len(without)} without",
        "batch norms among them. Written by",
        "[benchmarks/coverage/coverage.py](../benchmarks/coverage/coverage.py): random weights, batch-norm statistics",
        "of one pass of smooth noise, a small bank, first integers as recipe `ptq` finds them, and one training step",
        "on block outputs, at W8A8. This shows that every stage treats an architecture correctly, not what accuracy it",
        "keeps.",
        "",
        "Libraries start layer scales at 1e-6, and weights and class tokens at 0.02. Blocks then change almost",
        "nothing. In networks without batch norms, and in those with layer norms, weights have variance 1 / inputs,",
        "tokens and embeddings of positions a standard deviation of 0.5, biases of 0.1, and scales lie between 0.5",
        "and 1.5. A class token beside tokens that are ten times larger, as in XCiT, is still lost on their grid.",
        "",
        "- **tapped**: batch norms whose statistics the samples are made from, of all that are called.",
        "- **folded, exact**: batch norms that became part of the layer before, and those that stay as they are.",
        "- **folding**: largest change of a logit by folding, relative to the largest logit; at most 1e-4.",
        "- **student**: correlation of the student's logits with the teacher's over held-out samples, without the mean",
        "  of each class; at least 0.9.",
        "- **file**: images that the exported ONNX file puts into the student's class on ONNX Runtime; at least 90 %.",
        "- **integer layers**: convolutions, linear layers and products of activations in integer kernels of ONNX",
        "  Runtime; all.",
        "",
        "Random weights amplify every rounding error in attention, whose softmaxes they saturate (logits with a",
        "standard deviation of 3 to 14 in Visformer), in ConvMixer's 32 residual blocks, and in gMixer, which",
        "multiplies activations by each other (2 % of noise on images changes its logits by 23 %). Such networks",
        "miss the student's column; this says nothing about trained ones.",
        "",
        "| architecture | pixels | parameters | tapped | folded, exact | folding | student | file | integer layers | |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(source, each) for source, each in results.items()),
        "",
    ]
    return "\n".join(lines)


def _row(source: str, each: dict[str, object]) -> str:
    def cell(key: str, text: str) -> str:
        return text.format(**each) if key in each else "-"

    if "exact_batch_norms" in each:
        each = {**each, "folded": each["taps"] - each["exact_batch_norms"]}
    reason = reason_against(each)
    if not each.get("batch_norms", 1):
        each = {key: value for key, value in each.items() if key not in ("taps", "folded", "folding_error")}
    cells = [
        f"`{source}`",
        f"{each['size']}",
        f"{each['parameters'] / 1e6:.1f} M" if "parameters" in each else "-",
        cell("taps", "{taps} of {batch_norms}"),
        cell("folded", "{folded}, {exact_batch_norms}"),
        cell("folding_error", "{folding_error:.0e}"),
        cell("correlation", "{correlation:.3f}"),
        cell("agreement", "{agreement:.0f} %"),
        cell("integer_layers", "{integer_layers} of {quantized_layers}"),
        (reason or "passes").replace("|", "/").replace("\n", " ")[:200],
    ]
    return "| " + " | ".join(cells) + " |"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", nargs="*", default=[], help="sources to examine again")
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
