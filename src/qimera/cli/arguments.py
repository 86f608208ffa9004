"""Arguments and options that several commands take, and what their help says."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from qimera.cli import completion
from qimera.machine.modes import Target

_MODEL, _QUANTIZATION, _CHECKS, _OUTPUT = "Model", "Quantization", "Checks", "Computing and output"
"""Groups of options in the help of a command."""

Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        rich_help_panel=_QUANTIZATION,
        help="Recipe, see `qimera recipes`. `quantize` takes several, such as ptq,fast, and keeps the better student. "
        "Default: fast.",
        autocompletion=completion.recipes,
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        rich_help_panel=_QUANTIZATION,
        help="Change any setting, such as labels.superposition=false. Can be repeated.",
    ),
]

Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        rich_help_panel=_QUANTIZATION,
        help="The same seed gives the same result on the same machine. Default: 0.",
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        rich_help_panel=_QUANTIZATION,
        help="Unlabelled images of yours that join the samples: a folder, an image file, or .npz or .npy of uint8 "
        "images (NHWC).",
    ),
]
KeepImages = Annotated[
    bool | None,
    typer.Option(
        "--keep-images",
        rich_help_panel=_QUANTIZATION,
        help="Keep your images in the bank on disk. Without it, the bank remembers only their hash.",
    ),
]
Run = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="Run directory, the --output of `qimera quantize`.", autocompletion=completion.runs
    ),
]


def _use_threads(threads: int | None) -> int | None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return threads


Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        callback=_use_threads,
        rich_help_panel=_OUTPUT,
        help="CPU threads. Default: PyTorch's choice.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=_OUTPUT,
        help="Where to compute: cpu, cuda or cuda:1 (the second GPU). Default: a GPU if there is one.",
        autocompletion=completion.devices,
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", rich_help_panel=_CHECKS, help="Exit with code 5 if there are warnings.")
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        metavar="POINTS",
        min=0,
        rich_help_panel=_CHECKS,
        help="Exit with code 5 if the drop in top-1 accuracy is larger or unknown.",
    ),
]


@dataclass(frozen=True)
class OutputOptions:
    """How a command talks, as it was typed."""

    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            rich_help_panel=_OUTPUT,
            help="Print one JSON object on stdout; `qimera schema` describes its keys.",
        ),
    ] = False
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", rich_help_panel=_OUTPUT, help="Show only results and warnings, no progress."),
    ] = False
    debug: Annotated[
        bool, typer.Option("--debug", rich_help_panel=_OUTPUT, help="Show the log, and the traceback of an error.")
    ] = False


@dataclass(frozen=True)
class ModelOptions:
    """A model and its input, as they were typed; None where an option was left out."""

    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="file.py:function, module.path:function, timm:NAME, torchvision:NAME, hf-hub:REPO, program.pt2, "
            "or one that comes with the package: mnist_cnn, mnist_vit, mnist_convnext.",
            autocompletion=completion.models,
        ),
    ] = None
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_MODEL,
            help="Weights: safetensors, or a state dict of torch.save. No code in the file is executed.",
        ),
    ] = None
    input_shape: Annotated[
        str | None,
        typer.Option(
            metavar="C,H,W", rich_help_panel=_MODEL, help="Channels, height and width of an image, such as 3,224,224."
        ),
    ] = None
    mean: Annotated[
        str | None, typer.Option(metavar="A,B,C", rich_help_panel=_MODEL, help="Per-channel mean used in training.")
    ] = None
    std: Annotated[
        str | None, typer.Option(metavar="A,B,C", rich_help_panel=_MODEL, help="Per-channel std used in training.")
    ] = None
    pixel_range: Annotated[
        str | None,
        typer.Option(
            metavar="LOW,HIGH",
            rich_help_panel=_MODEL,
            help="Pixel values before normalisation, e.g. 0,255. Default: 0,1.",
        ),
    ] = None
    logits: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            rich_help_panel=_MODEL,
            help="Which of several outputs holds the logits, such as 0 or head.logits. Default: detected.",
        ),
    ] = None


@dataclass(frozen=True)
class RunOptions:
    """How to quantize, as it was typed; None where an option was left out."""

    bits: Annotated[
        str | None,
        typer.Option(
            metavar="WxAy",
            rich_help_panel=_QUANTIZATION,
            help="Bits of weights and activations, 2 to 8. w8a8,w4a4 makes a student of each. Default: w4a4.",
            autocompletion=completion.bits,
        ),
    ] = None
    layer_bits: Annotated[
        str | None,
        typer.Option(
            metavar="RULES",
            rich_help_panel=_QUANTIZATION,
            help="Exceptions by layer name, such as 'conv1=8,*fc*=w8a4'.",
        ),
    ] = None
    first_last_bits: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=_QUANTIZATION,
            help="Bits of the first layer, its output and the last layer (often 8). Default: as all other layers.",
        ),
    ] = None
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="LIMIT",
            rich_help_panel=_QUANTIZATION,
            help="Choose bits per layer for a share of full precision: size=0.14, or bops=0.016 for bit operations.",
            autocompletion=completion.budgets,
        ),
    ] = None
    scheme: Annotated[
        Literal["hardware", "paper"] | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_QUANTIZATION,
            help="hardware, as integer kernels need it, or paper, as GDFQ and Qimera quantize. Default: hardware.",
        ),
    ] = None
    target: Annotated[
        Target | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_QUANTIZATION,
            help=f"Runtime to match, of {', '.join(get_args(Target))}. Default: onnxruntime.",
        ),
    ] = None
    recipe: Recipe = None
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            rich_help_panel=_QUANTIZATION,
            help="Training steps of the student. 0 means no training. Default: the recipe's.",
        ),
    ] = None
    set_: Changes = None
    bank: Annotated[
        Path | None,
        typer.Option(
            metavar="BANK", rich_help_panel=_QUANTIZATION, help="Use a bank that `qimera synthesize` has made."
        ),
    ] = None
    images: Images = None
    keep_images: KeepImages = None
    seed: Seed = None


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that takes every field of its dataclass parameters as an option of its own."""
    signature, keyword = inspect.signature(command), inspect.Parameter.KEYWORD_ONLY
    groups: dict[str, Any] = {
        name: each.annotation for name, each in signature.parameters.items() if is_dataclass(each.annotation)
    }
    parameters: list[inspect.Parameter] = []
    for name, each in signature.parameters.items():
        if name in groups:
            parameters += [
                inspect.Parameter(field.name, keyword, default=field.default, annotation=field.type)
                for field in fields(groups[name])
            ]
        else:
            parameters.append(each.replace(kind=keyword))

    @wraps(command)
    def spread_out(**values: Any) -> None:
        grouped = {
            name: kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        command(**values, **grouped)

    spread_out.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    spread_out.__annotations__ = {each.name: each.annotation for each in parameters}
    return spread_out
