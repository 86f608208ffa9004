"""Where samples lie in the space of a network's features, beside real images, with and without superposition.

    python -m benchmarks.pictures.features resnet20_cifar10     # docs/features.png, and a file in results

Three ways to make them: drawn from the generator with everything that the paper gives it, the same refined directly
(recipe qimera), and images optimised directly (recipe fast). Real images only judge.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from benchmarks.measurement import keep, prepare
from benchmarks.pictures.tables import FEATURES
from qimera import LabelledImages, Teacher, recipe, synthesize
from qimera.assessment.diagnostics import features_of, margins_of
from qimera.cli.console import ProgressDisplay
from qimera.config.settings import SynthesisSettings
from qimera.synthesis.superposition import shows_one_class

NUM_REAL = 2000
MARGINS = (0.1, 0.3, 0.5)
"""Of the most probable class over the second; the share of samples with less is reported."""


@dataclass(frozen=True)
class Seen:
    """Some images as the network sees them."""

    kind: str
    features: Tensor
    """(sample, feature), what the classifier reads."""
    margins: Tensor
    """(sample,)"""


def main() -> None:
    """Make the samples, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--samples", type=int, default=1024, help="of each way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "docs" / "features.png")
    options = parser.parse_args()
    teacher, images, _ = prepare(options)
    real, others = _real(images, teacher)
    ways: dict[str, list[Seen]] = {}
    with ProgressDisplay() as progress:
        for name, settings in _ways(teacher, options.samples).items():
            bank = synthesize(teacher, settings=settings, seed=options.seed, progress=progress)
            single = shows_one_class(bank.soft_labels)
            images_of = teacher.input_spec.normalize(bank.pixels)
            ways[name] = [
                _look(kind, images_of[chosen], teacher)
                for kind, chosen in (("one class", single), ("superposed", ~single))
            ]
    rows = [_measure("real images", others, real)]
    rows += [_measure(name, seen, real) for name, found in ways.items() for seen in found]
    path = FEATURES / f"{options.network}-{options.seed}.json"
    keep(path, {"network": options.network, "seed": options.seed, "rows": rows}, f"{len(rows)} rows")
    draw(ways, real, options.output)


def _real(images: LabelledImages, teacher: Teacher) -> list[Seen]:
    """Return two halves of some real images."""
    batches = images.batches(NUM_REAL)
    pixels = [torch.from_numpy(next(batches)[0]).permute(0, 3, 1, 2).contiguous() for _ in range(2)]
    return [_look("real", teacher.input_spec.normalize(each), teacher) for each in pixels]


def _ways(teacher: Teacher, num_samples: int) -> dict[str, SynthesisSettings]:
    """Return what makes the samples."""
    qimera, fast = (recipe(name, teacher.input_spec, teacher.num_classes).synthesis for name in ("qimera", "fast"))
    return {
        "generator": qimera.replace(num_generated=num_samples, num_optimized=0, num_held_out=0),
        "generator, refined (qimera)": qimera.replace(num_optimized=num_samples, num_held_out=0),
        "optimised directly (fast)": fast.replace(num_optimized=num_samples, num_held_out=0),
    }


def _look(kind: str, images: Tensor, teacher: Teacher) -> Seen:
    with torch.no_grad():
        logits = torch.cat([teacher(part) for part in images.split(256)])
        return Seen(kind, features_of(images, teacher), margins_of(logits))


def _measure(way: str, seen: Seen, real: Seen) -> dict[str, object]:
    """Return how far samples are from real images, real images from samples, and how near to a boundary they lie."""
    distances = torch.cdist(seen.features, real.features)
    return {
        "way": way,
        "kind": seen.kind,
        "num_samples": len(seen.features),
        "to_real": float(distances.amin(1).mean()),
        "from_real": float(distances.amin(0).mean()),
        "margins": {str(limit): 100 * float((seen.margins < limit).float().mean()) for limit in MARGINS},
    }


def draw(ways: dict[str, list[Seen]], real: Seen, output: Path) -> None:
    """Draw features in the plane of the real ones' first two principal components, one panel for each way."""
    mean = real.features.mean(0)
    plane = torch.linalg.svd(real.features - mean, full_matrices=False).Vh[:2].T
    figure, axes = plt.subplots(1, len(ways), figsize=(4.2 * len(ways), 4.4), sharex=True, sharey=True)
    for axis, (way, found) in zip(axes, ways.items(), strict=True):
        axis.scatter(*((real.features - mean) @ plane).T, s=5, color="0.8", label="real images")
        for seen, mark, colour in zip(found, "ox", ("tab:blue", "tab:orange"), strict=True):
            axis.scatter(*((seen.features - mean) @ plane).T, s=9, marker=mark, color=colour, lw=0.7, label=seen.kind)
        axis.set_title(way, fontsize=10)
        axis.set_xlabel("first principal component")
    axes[0].set_ylabel("second principal component")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
