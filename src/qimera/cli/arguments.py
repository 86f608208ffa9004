"""Arguments and options that several commands take, and what their help says."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES", help="See qimera recipes; of several, such as ptq,fast, the best is kept. Default: fast."
    ),
]
Seed = Annotated[
    int | None, typer.Option(min=0, max=(1 << 63) - 1, help="Same seed, same machine, same result. Default: 0.")
]


def _use_threads(threads: int | None) -> int | None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return threads


Threads = Annotated[
    int | None, typer.Option(min=1, callback=_use_threads, help="CPU threads. Default: what torch chooses.")
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Where to compute: cpu, cuda or cuda:1 (the second GPU). Default: a GPU if there is one.",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="End with exit code 5 if there are warnings.")]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        metavar="POINTS",
        min=0,
        help="End with exit code 5 if more top-1 accuracy is lost, or nobody knows how much.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the log.")]


@dataclass(frozen=True)
class ModelOptions:
    """A model and its input, as they were typed; None where an option was left out."""

    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="file.py:function, module.path:function, timm:NAME, torchvision:NAME, hf-hub:REPO, program.pt2, "
            "or one that comes with the package: mnist_cnn, mnist_vit, mnist_convnext.",
        ),
    ] = None
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="safetensors, or a state dict of torch.save; no code in it is executed."),
    ] = None
    input_shape: Annotated[str | None, typer.Option(metavar="C,H,W", help="One image, such as 3,224,224.")] = None
    mean: Annotated[str | None, typer.Option(metavar="A,B,C", help="Per-channel mean used in training.")] = None
    std: Annotated[str | None, typer.Option(metavar="A,B,C", help="Per-channel std used in training.")] = None
    pixel_range: Annotated[
        str | None,
        typer.Option(metavar="LOW,HIGH", help="Pixel values before normalisation, e.g. 0,255. Default: 0,1."),
    ] = None
    logits: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="Which of several outputs the logits are, such as 0 or head.logits. Default: found."
        ),
    ] = None


@dataclass(frozen=True)
class RunOptions:
    """How to quantize, as it was typed; None where an option was left out."""

    bits: Annotated[
        str | None,
        typer.Option(help="Of weights and activations, 2 to 8; of several, as in w8a8,w4a4, each. Default: w4a4."),
    ] = None
    layer_bits: Annotated[
        str | None, typer.Option(metavar="RULES", help="Exceptions by layer name, such as 'conv1=8,*fc*=w8a4'.")
    ] = None
    budget: Annotated[
        str | None,
        typer.Option(metavar="size=SHARE|bops=SHARE", help="Find bits per layer for this share of full precision."),
    ] = None
    scheme: Annotated[
        Literal["hardware", "paper"] | None,
        typer.Option(help="What integer kernels need, or as published. Default: hardware."),
    ] = None
    target: Annotated[
        Literal["onnxruntime", "openvino", "inductor", "xnnpack"] | None,
        typer.Option(help="Runtime whose rounding to match. Default: onnxruntime."),
    ] = None
    recipe: Recipe = None
    steps: Annotated[
        int | None, typer.Option(min=0, help="Training steps of the student, instead of the recipe's; 0 for none.")
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any setting, such as labels.superposition=false; repeatable.",
        ),
    ] = None
    bank: Annotated[Path | None, typer.Option(metavar="BANK", help="Made earlier by qimera synthesize.")] = None
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
