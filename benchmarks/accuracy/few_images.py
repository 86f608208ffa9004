"""What a few unlabelled images of the user's are worth: beside the samples of recipe ptq, and alone.

    python -m benchmarks.accuracy.few_images resnet20_cifar10               # minutes for each count; can be resumed
    python -m benchmarks.accuracy.few_images mobilenet_v1_075_imagenet --counts 0 64 --seeds 0

The images are training images of CIFAR-10, drawn by the seed, and every second test image scores. Or they are of one
half of the ImageNet images, and the other half scores. docs/your-images.md has the table.
"""

import argparse
import warnings
from dataclasses import replace

import numpy as np
import torch

from benchmarks.accuracy.drops import kept_bank
from benchmarks.accuracy.tables import FEW_IMAGES
from benchmarks.measurement import BANKS, keep
from benchmarks.zoo import load_subject, load_training_images
from qimera import LabelledImages, SampleBank, Teacher, evaluate, quantize, recipe
from qimera.cli.console import ProgressDisplay

BITS = "w4a4"


def main() -> None:
    """Measure what has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--counts", nargs="+", type=int, default=[0, 1, 10, 100, 1000])
    parser.add_argument("--ways", nargs="+", choices=("beside", "alone"), default=["beside", "alone"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    teacher, data = load_subject(options.network)
    ptq = recipe("ptq", teacher.input_spec, teacher.num_classes)
    for seed in options.seeds:
        own, scoring = _split(options.network, data, seed)
        with ProgressDisplay() as progress:
            path = BANKS / f"{options.network}-ptq-{seed}"
            bank, _ = kept_bank(path, teacher, ptq.synthesis, seed, progress)
            for count in options.counts:
                for way in options.ways if count else ["beside"]:
                    path = FEW_IMAGES / options.network / f"{BITS}-{way}-{count}-{seed}.json"
                    if path.exists():
                        continue
                    used = _with_images(bank, way, own[:count], teacher) if count else bank
                    student = quantize(teacher, used, BITS, recipe="ptq", seed=seed, progress=progress)
                    result = evaluate(student, scoring, teacher.input_spec, teacher=teacher)
                    assert result.teacher_top1 is not None
                    drop = result.teacher_top1 - result.top1
                    facts = {"network": options.network, "bits": BITS, "way": way, "count": count, "seed": seed}
                    found = {"drop": drop, "agreement": result.agreement, "num_images": result.num_images}
                    keep(path, facts | found, f"drop {drop:.2f}")


def _split(network: str, data: LabelledImages, seed: int) -> tuple[torch.Tensor, LabelledImages]:
    """Return images of the user's, in the order of the seed, and those that score."""
    rng = np.random.default_rng(seed)
    if network.endswith("_imagenet"):
        order = np.random.default_rng(0).permutation(len(data))
        half, rest = order[::2], np.sort(order[1::2])
        own, scoring = data.images[:][rng.permutation(half)], LabelledImages(data.images[:][rest], data.labels[rest])
    else:
        images = load_training_images(network)
        own = images[rng.permutation(len(images))[:1000]]
        scoring = LabelledImages(data.images[:][::2], data.labels[::2])
    return torch.from_numpy(own).permute(0, 3, 1, 2).contiguous(), scoring


def _with_images(bank: SampleBank, way: str, images: torch.Tensor, teacher: Teacher) -> SampleBank:
    if way == "alone":
        start = bank.num_training
        parts = {name: getattr(bank, name)[start:] for name in ("pixels", "soft_labels", "logits")}
        bank = replace(bank, **parts, settings=bank.settings.replace(num_optimized=0))
    return bank.with_images(images, teacher)


if __name__ == "__main__":
    main()
