"""Arguments and options that several commands take, and what their help says."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="file.py:function, module.path:function, timm:NAME, torchvision:NAME, hf-hub:REPO, program.pt2, "
        "or the embedded mnist_cnn.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="safetensors, or a state dict of torch.save; no code in it is executed."),
]
Shape = Annotated[str | None, typer.Option(metavar="C,H,W", help="One image, such as 3,224,224.")]
Mean = Annotated[str | None, typer.Option(metavar="A,B,C", help="Subtracted from pixels in training, per channel.")]
Std = Annotated[str | None, typer.Option(metavar="A,B,C", help="Pixels were divided by it in training, per channel.")]
PixelRange = Annotated[
    str | None, typer.Option(metavar="LOW,HIGH", help="Of pixels before mean and std. Default: 0,1.")
]
Logits = Annotated[
    str | None,
    typer.Option(
        metavar="KEY", help="Which of several outputs the logits are, such as 0 or head.logits. Default: found."
    ),
]
WithoutBatchNorms = Annotated[
    bool | None,
    typer.Option("--without-batch-norms", help="Take a model that has none; its samples are little better than noise."),
]
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
        metavar="NAME", help="Where to compute: cpu, or cuda (a GPU), or cuda:1 (the second one). Default: cpu."
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
