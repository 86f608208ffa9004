"""Draw docs/boundary-samples.png: synthetic samples of the embedded classifier on the way from one class to another.

python -m benchmarks.pictures.boundary_samples [--output docs/boundary-samples.png]
"""

import argparse
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from qimera import InputSpec, SampleBank, SynthesisSettings, Teacher
from qimera.synthesis.direct import noise_images, optimize_images
from qimera.synthesis.superposition import soft_labels
from qimera.teacher.sources import EMBEDDED_MODELS, load_model

PAIRS = ((3, 8), (4, 9), (1, 7), (0, 6), (2, 5))
SHARES = (0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0)
COPIES = 4
"""Batches beside the drawn one that the batch-norm statistics are shared with."""


def main() -> None:
    """Optimise the samples and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "docs" / "boundary-samples.png")
    output = parser.parse_args().output
    warnings.simplefilter("ignore")
    spec = EMBEDDED_MODELS["mnist_cnn"].input_spec
    teacher = Teacher.capture(load_model("mnist_cnn"), spec)
    draw(walk(teacher, spec), output)


def walk(teacher: Teacher, spec: InputSpec) -> SampleBank:
    """Return one sample per pair and share, row by row; all of a row start from the same noise."""
    rng = torch.Generator().manual_seed(0)
    settings = SynthesisSettings()
    label = torch.tensor([pair for pair in PAIRS for _ in SHARES]).repeat(COPIES, 1)
    weight = torch.tensor([[1 - share, share] for _ in PAIRS for share in SHARES]).repeat(COPIES, 1)
    wanted = soft_labels(label, weight, teacher.num_classes)
    noise = noise_images(len(PAIRS) * COPIES, spec.shape, settings.direct.num_scales, rng)
    start = noise.repeat_interleave(len(SHARES), 0)
    images = optimize_images(start, wanted, teacher, settings.direct, rng)
    shown = len(PAIRS) * len(SHARES)
    return SampleBank.from_images(images[:shown], wanted[:shown], teacher, settings, 0)


def draw(bank: SampleBank, output: Path) -> None:
    """Draw the rows with the teacher's probability of both classes below each sample."""
    figure, axes = plt.subplots(len(PAIRS), len(SHARES), figsize=(8.4, 7.0), layout="constrained")
    probabilities = bank.logits.softmax(1)
    for index, axis in enumerate(axes.flat):
        first, second = PAIRS[index // len(SHARES)]
        answer = probabilities[index]
        axis.imshow(bank.pixels[index, 0], cmap="gray", vmin=0, vmax=255)
        axis.set_xticks([], [])
        axis.set_yticks([], [])
        axis.set_xlabel(f"{first}: {answer[first]:.2f}   {second}: {answer[second]:.2f}", fontsize=8)
        if index < len(SHARES):
            axis.set_title(f"{1 - SHARES[index]:.2f} / {SHARES[index]:.2f}", fontsize=9)
        if index % len(SHARES) == 0:
            axis.set_ylabel(f"{first} to {second}", fontsize=10)
    figure.suptitle("wanted shares of the two classes; below each sample the teacher's probabilities", fontsize=10)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
