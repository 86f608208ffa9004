"""Train a network without batch norms on the CIFAR-10 images of the zoo, and write its weights beside the benchmarks.

    OMP_NUM_THREADS=1 python -m scripts.train_cifar_teacher convnext_cifar10  # or vit_cifar10

``convnext_cifar10`` takes 35 minutes of one core and ``vit_cifar10`` 55. An interrupted training continues with the
same command. Half of the target of ``vit_cifar10`` is the answer of ``resnet20_cifar10`` (distillation as in
DeiT, Touvron et al. 2021), without which a transformer needs far more epochs on so few images. Until its last epochs it
sees half of the patches of an image (PatchDropout, Liu et al. 2022), which halves the time.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.teachers.networks import BUILDERS, INPUT_SPEC, CifarVit, weights_of
from benchmarks.zoo import load_labelled, load_model_of
from qimera import LabelledImages, evaluate
from qimera.synthesis.augmentation import flip_at_random, shift_each
from scripts.train_embedded_model import Recipe, make_optimizer, read_options, to_inputs

SEED = 0
BATCH_SIZE = 128
MAX_SHIFT = 4
"""Pixels."""
CUT_OUT = 8
"""Side of the square that is taken out of each image, in pixels."""
NUM_PATCHES = 64
"""Of ``vit_cifar10``."""


@dataclass(frozen=True)
class CifarRecipe(Recipe):
    """How one network is trained."""

    autocast: bool = False
    """Whether convolutions and linear layers compute in bfloat16, which pays where they are large."""
    teacher: str | None = None
    """The network whose answers it also learns."""
    num_full_epochs: int = 0
    """The last ones, in which a network that drops patches keeps them all."""


RECIPES = {
    "convnext_cifar10": CifarRecipe(
        num_epochs=25, optimizer="adamw", peak_learning_rate=4e-3, weight_decay=0.05, autocast=True
    ),
    "vit_cifar10": CifarRecipe(
        num_epochs=30,
        optimizer="adamw",
        peak_learning_rate=2e-3,
        weight_decay=0.05,
        teacher="resnet20_cifar10",
        num_full_epochs=3,
    ),
}


def main() -> None:
    """Train, report and save."""
    options = read_options(__doc__, RECIPES, "the file beside the benchmarks")
    recipe, output = RECIPES[options.network], options.output or weights_of(options.network)

    torch.manual_seed(SEED)
    network = BUILDERS[options.network]()
    state = output.with_suffix(".state.pt")
    course = Course(network, recipe, options.epochs or recipe.num_epochs, load_labelled("cifar10_train"))
    course.run(state)
    test = load_labelled("cifar10_test")
    print(f"test images: {evaluate(network.eval(), test, INPUT_SPEC).top1:.2f} %")
    save_file({name: each.half() for name, each in network.state_dict().items()}, output)
    network.load_state_dict(load_file(output))
    print(f"after rounding to 16 bits: {evaluate(network, test, INPUT_SPEC).top1:.2f} %")
    print(f"wrote {output} ({output.stat().st_size} bytes)")
    state.unlink(missing_ok=True)


class Course:
    """A training: all that a step changes."""

    def __init__(self, network: nn.Module, recipe: CifarRecipe, num_epochs: int, data: LabelledImages) -> None:
        self.network, self.recipe, self.num_epochs = network, recipe, num_epochs
        self.rng = torch.Generator().manual_seed(SEED)
        self.images, self.labels = to_inputs(data, INPUT_SPEC), torch.from_numpy(data.labels)
        num_steps = num_epochs * (len(self.labels) // BATCH_SIZE)
        self.optimizer, self.schedule = make_optimizer(network.parameters(), recipe, num_steps)
        self.teacher = load_model_of(recipe.teacher).eval() if recipe.teacher else None
        self.loss = torch.compile(self._loss)

    def run(self, path: Path) -> None:
        """Train for all epochs, from the one that ``path`` holds; the state after the last one is the result."""
        num_epochs, num_dropping = 0, self.num_epochs - self.recipe.num_full_epochs
        if path.exists():
            num_epochs = self._load(torch.load(path, weights_only=True))
        for epoch in range(num_epochs, self.num_epochs):
            start, losses = time.perf_counter(), []
            order = torch.randperm(len(self.labels), generator=self.rng)
            for chosen in order[: len(order) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
                images = augmented(self.images[chosen], self.rng)
                losses.append(self.step(images, self.labels[chosen], drops=epoch < num_dropping))
            mean = torch.stack(losses).mean().item()
            print(f"epoch {epoch + 1}: loss {mean:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
            torch.save(self._state(epoch + 1), path)

    def step(self, images: Float[Tensor, "batch 3 32 32"], labels: Tensor, drops: bool) -> Tensor:
        """Train on one batch; return the loss."""
        num_kept = NUM_PATCHES // 2 if drops else NUM_PATCHES
        kept = torch.randperm(NUM_PATCHES, generator=self.rng)[:num_kept] + 1
        loss = self.loss(images, labels, torch.cat([torch.zeros(1, dtype=torch.long), kept]))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def _loss(self, images: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        target = F.one_hot(labels, 10).float()
        if self.teacher is not None:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                target = torch.lerp(target, self.teacher(images).float().softmax(1), 0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.autocast):
            network = self.network
            drops_patches = isinstance(network, CifarVit)
            logits = network.classify(network.embed(images)[:, kept]) if drops_patches else network(images)
        return F.cross_entropy(logits.float(), target)

    def _state(self, num_epochs: int) -> dict[str, object]:
        parts = {"network": self.network, "optimizer": self.optimizer, "schedule": self.schedule}
        states: dict[str, object] = {name: part.state_dict() for name, part in parts.items()}
        return states | {"num_epochs": num_epochs, "rng": self.rng.get_state()}

    def _load(self, state: dict[str, object]) -> int:
        for name in ("network", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.rng.set_state(state["rng"])
        return int(state["num_epochs"])


def augmented(images: Float[Tensor, "batch 3 32 32"], rng: torch.Generator) -> Float[Tensor, "batch 3 32 32"]:
    """Return each image shifted and mirrored at random, and without one square of random place."""
    images = shift_each(flip_at_random(images, rng), MAX_SHIFT, rng)
    corner = torch.randint(32 + CUT_OUT, (2, len(images), 1), generator=rng) - CUT_OUT
    inside = (torch.arange(32) >= corner) & (torch.arange(32) < corner + CUT_OUT)  # (axis, batch, pixel)
    return images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)


if __name__ == "__main__":
    main()
