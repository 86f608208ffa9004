"""What a bank gives away: are synthetic samples nearer to the images that the network was trained on than to others?

    python -m benchmarks.privacy.audit resnet20_cifar10      # a quarter of an hour on one core; banks are kept
    python -m benchmarks.privacy.audit control_cifar10       # a network that knows 500 images by heart
    python -m benchmarks.privacy.audit --draw                # build/privacy-pairs.png, from what all of them found

Banks of every producer are compared with trained and other images, in pixels and in the features of a network that was
trained on neither. Beside them stand banks that leak on purpose, so that it is known what the audit can see. Then
members are told from others by their loss, of the teacher and of a student. docs/privacy.md says what this proves.
"""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measurement import BANKS, keep
from benchmarks.mnist import load_mnist_split
from benchmarks.privacy.control import NUM_IMAGES, control_teacher
from benchmarks.privacy.neighbours import Neighbours, auc, judge, nearest
from benchmarks.privacy.tables import RESULTS
from benchmarks.zoo import load_model_of, load_subject, load_training_images, load_zoo
from qimera import SampleBank, SynthesisSettings, Teacher, quantize, recipe, synthesize
from qimera.cli.console import ProgressDisplay

WORK = BANKS / "privacy"
NETWORKS = ("resnet20_cifar10", "mobilenetv2_cifar10", "mnist_cnn", "control_cifar10")
NUM_SAMPLES = 256
MOST_MEMBERS = 4000
RANKS = {False: 300, True: 700}
"""Nearest images that are remembered of a sample; more where few of all images were trained on."""
LOOKS_AT = "resnet20_cifar100"
"""Whose features are compared: it was trained on images that none of the other networks has seen."""


@dataclass(frozen=True)
class Subject:
    """A network, images that it was trained on, and others."""

    name: str
    teacher: Teacher
    trained: np.ndarray
    trained_labels: np.ndarray
    others: np.ndarray
    other_labels: np.ndarray
    reference: Teacher | None = None
    """Of the same kind, trained on as many other images."""

    @property
    def is_control(self) -> bool:
        """Whether the network knows its images by heart."""
        return self.reference is not None


def subject_of(name: str) -> Subject:
    """Return the subject called ``name``."""
    if name == "mnist_cnn":
        split = load_mnist_split()
        teacher, _ = load_subject(name)
        own, others = split.train, split.held_out
        return Subject(name, teacher, own.images[:], own.labels, others.images[:], others.labels)
    zoo = load_zoo()
    assert zoo is not None
    others, other_labels = zoo.load_images("cifar10_test")
    images, labels = zoo.load_images("cifar10_train")
    if name != "control_cifar10":
        return Subject(name, load_subject(name)[0], load_training_images(name), labels, others, other_labels)
    order = np.random.default_rng(0).permutation(len(images))
    parts = [order[NUM_IMAGES * seed :][:NUM_IMAGES] for seed in (0, 1)]
    teacher, reference = (
        control_teacher(images[part], labels[part], WORK / f"control-{seed}.safetensors", seed)
        for seed, part in enumerate(parts)
    )
    return Subject(name, teacher, images[parts[0]], labels[parts[0]], others, other_labels, reference)


# --- banks ------------------------------------------------------------------------------------------------------------


def banks_of(subject: Subject) -> dict[str, Tensor]:
    """Return the pixels (sample, channel, height, width) of every bank by its name, leaking ones last."""
    spec, num_classes = subject.teacher.input_spec, subject.teacher.num_classes
    few = {"num_optimized": NUM_SAMPLES, "num_held_out": 0}
    ptq, qimera = (recipe(name, spec, num_classes).synthesis.replace(**few) for name in ("ptq", "qimera"))
    refined, direct = _bank(subject, "qimera", qimera), _bank(subject, "ptq", ptq)
    assert refined.synthesizer is not None
    with torch.no_grad():
        drawn = refined.synthesizer(refined.synthesizer.draw(NUM_SAMPLES, torch.Generator().manual_seed(0)))[0]
    found = {
        "generator": spec.to_pixels(drawn),
        "generator, refined": refined.pixels[:NUM_SAMPLES],
        "direct": direct.pixels[:NUM_SAMPLES],
    }
    if subject.is_control:
        long = ptq.replace(direct=ptq.direct.replace(num_steps=400))
        found["direct, 400 steps"] = _bank(subject, "ptq-long", long).pixels
    rng = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(subject.trained), generator=rng)[:NUM_SAMPLES]
    copies = torch.from_numpy(subject.trained[chosen.numpy()]).permute(0, 3, 1, 2).float()
    noisy = (copies + 25 * torch.randn(copies.shape, generator=rng)).clamp(0, 255).round().to(torch.uint8)
    few = found["direct"].clone()
    few[: NUM_SAMPLES // 25] = noisy[: NUM_SAMPLES // 25]
    found["leaking: all are noisy copies"] = noisy
    found["leaking: 1 in 25 is a noisy copy"] = few
    for share in (0.5, 0.25):
        blended = share * copies + (1 - share) * found["direct"].float()
        found[f"leaking: {100 * share:.0f} % of a training image in each"] = blended.round().to(torch.uint8)
    return found


def _bank(subject: Subject, name: str, settings: SynthesisSettings) -> SampleBank:
    """Return the bank of a recipe that another benchmark has made, or a smaller one."""
    path = BANKS / f"{subject.name}-{name}-0"
    if not path.exists():
        path = WORK / f"bank-{subject.name}-{name}"
    if not path.exists():
        with ProgressDisplay() as progress:
            synthesize(subject.teacher, settings=settings, seed=0, progress=progress).save(path)
    return SampleBank.load(path, subject.teacher)


# --- spaces -----------------------------------------------------------------------------------------------------------


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1).float() / 255


@torch.inference_mode()
def _features(images: Tensor) -> Tensor:
    """Return what two stages of ``LOOKS_AT`` make of pixels, on a coarse grid, each of length 1."""
    zoo = load_zoo()
    assert zoo is not None
    network = load_model_of(LOOKS_AT)
    channels, height, width = images.shape[1:]
    stages: list[Tensor] = []
    hooks = [
        getattr(network, stage).register_forward_hook(lambda *call, size=size: stages.append(_coarse(call[2], size)))
        for stage, size in (("layer2", 4), ("layer3", 2))
    ]
    found = []
    for part in images.split(250):
        colour = part.float().expand(-1, 3, -1, -1) if channels == 1 else part.float()
        square = F.pad(colour, ((32 - width) // 2,) * 2 + ((32 - height) // 2,) * 2) / 255
        stages.clear()
        network((square - MEAN) / STD)
        found.append(torch.cat(stages, 1))
    for hook in hooks:
        hook.remove()
    return torch.cat(found)


MEAN = torch.tensor([0.5071, 0.4865, 0.4409]).view(3, 1, 1)
STD = torch.tensor([0.2673, 0.2564, 0.2762]).view(3, 1, 1)


def _coarse(values: Tensor, size: int) -> Tensor:
    return F.normalize(F.adaptive_avg_pool2d(values, size).flatten(1), dim=1)


SPACES: dict[str, Callable[[Tensor], Tensor]] = {"pixels": _pixels, "features": _features}


def _of_real(subject: Subject, space: str) -> tuple[Tensor, Tensor]:
    """Return trained and other images in a space, one after the other, and which are trained ones."""
    images = torch.from_numpy(np.concatenate([subject.trained, subject.others])).permute(0, 3, 1, 2)
    is_trained = torch.arange(len(images)) < len(subject.trained)
    if space == "pixels":
        return images.flatten(1), is_trained
    path = WORK / f"features-{'cifar10' if not subject.is_control and 'cifar' in subject.name else subject.name}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, _features(images).half().numpy())
    return torch.from_numpy(np.load(path)), is_trained


# --- the audit --------------------------------------------------------------------------------------------------------


def examine(subject: Subject) -> dict[str, object]:
    """Return what was found of every bank in every space, and keep the nearest pairs."""
    banks = banks_of(subject)
    rows: list[dict[str, object]] = []
    pairs: dict[str, np.ndarray] = {}
    for space, embed in SPACES.items():
        real, is_trained = _of_real(subject, space)
        real = real.float() / 255 if space == "pixels" else real
        for name, pixels in banks.items():
            found = nearest(embed(pixels), real, RANKS[subject.is_control])
            verdict = judge(found, is_trained, torch.Generator().manual_seed(0))
            tests = {"p_copies": verdict.p_copies, "is_detected": verdict.is_detected}
            rows.append({"space": space, "bank": name, **asdict(verdict), **tests})
            print(subject.name, rows[-1], flush=True)
            if space == "pixels" and not name.startswith("leaking"):
                pairs[name] = _pairs(subject, pixels, found, is_trained)
    WORK.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(WORK / f"pairs-{subject.name}.npz", **pairs)
    counts = {"num_trained": len(subject.trained), "num_others": len(subject.others), "num_samples": NUM_SAMPLES}
    return {**counts, "rows": rows}


def _pairs(subject: Subject, pixels: Tensor, found: Neighbours, is_trained: Tensor) -> np.ndarray:
    """Return (pair, sample and nearest trained and other image, height, width, channel), the nearest four pairs."""
    images = np.concatenate([subject.trained, subject.others])
    member = is_trained[found.index]
    nearest_trained = torch.where(member, found.distance, torch.inf).amin(1)
    nearest_trained[~(~member).any(1)] = torch.inf
    triples = []
    for sample in nearest_trained.argsort()[:4].tolist():
        places = [int(found.index[sample][chosen][0]) for chosen in (member[sample], ~member[sample])]
        triples.append(np.stack([pixels[sample].permute(1, 2, 0).numpy(), *(images[place] for place in places)]))
    return np.stack(triples)


def infer_membership(subject: Subject) -> list[dict[str, object]]:
    """Return how well members are told from others by their loss, by the teacher and by a student."""
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(len(each))[:MOST_MEMBERS] for each in (subject.trained, subject.others)]
    members, others = (
        (torch.from_numpy(images[part]).permute(0, 3, 1, 2), torch.from_numpy(labels[part]))
        for images, labels, part in (
            (subject.trained, subject.trained_labels, chosen[0]),
            (subject.others, subject.other_labels, chosen[1]),
        )
    )
    few = recipe("ptq", subject.teacher.input_spec, subject.teacher.num_classes).synthesis
    bank = _bank(subject, "ptq", few.replace(num_optimized=NUM_SAMPLES, num_held_out=0))
    student = quantize(subject.teacher, bank, "w4a4", recipe="ptq")
    networks: dict[str, nn.Module] = {"teacher": subject.teacher, "student, W4A4": student}
    losses = {
        name: [_losses(network, subject.teacher, *each) for each in (members, others)]
        for name, network in networks.items()
    }
    attacks = {(name, "loss"): [-each for each in found] for name, found in losses.items()}
    if subject.reference is not None:
        usual = [_losses(subject.reference, subject.teacher, *each) for each in (members, others)]
        for name, found in losses.items():
            attacks[name, "loss, compared with a reference"] = [a - b for a, b in zip(usual, found, strict=True)]
    counts = {"num_members": len(chosen[0]), "num_others": len(chosen[1])}
    return [
        {"network": name, "attack": attack, **counts, **_quality(*scores)} for (name, attack), scores in attacks.items()
    ]


@torch.inference_mode()
def _losses(network: nn.Module, teacher: Teacher, pixels: Tensor, labels: Tensor) -> Tensor:
    parts = zip(pixels.split(100), labels.split(100), strict=True)
    return torch.cat([F.cross_entropy(network(teacher.input_spec.normalize(x)), y, reduction="none") for x, y in parts])


def _quality(members: Tensor, others: Tensor) -> dict[str, float]:
    """Return the area under the curve, its 90 percent interval from resampled images, and hits at 1 % false alarms."""
    rng = torch.Generator().manual_seed(0)

    def drawn(values: Tensor) -> Tensor:
        return values[torch.randint(len(values), (len(values),), generator=rng)]

    areas = torch.tensor([auc(drawn(members), drawn(others)) for _ in range(300)])
    low, high = areas.quantile(torch.tensor([0.05, 0.95])).tolist()
    limit = others.sort().values[-1 - len(others) // 100]
    above, equal = (
        [float(test(each, limit).float().mean()) for each in (members, others)] for test in (torch.gt, torch.eq)
    )
    hits = above[0] + equal[0] * (0.01 - above[1]) / equal[1]  # many losses are 0: of equal ones a part is guessed
    return {"auc": auc(members, others), "auc_low": low, "auc_high": high, "hits_at_1_percent": 100 * hits}


def main() -> None:
    """Audit what has no result yet, or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--draw", action="store_true", help="draw the nearest pairs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "build" / "privacy-pairs.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in options.networks:
        path = RESULTS / f"{name}.json"
        if path.exists():
            print(f"{path}: {name} is audited already; remove the file to audit it again")
            continue
        subject = subject_of(name)
        keep(path, {"network": name, **examine(subject), "membership": infer_membership(subject)}, "audited")
    if options.draw:
        draw(options.output)


def draw(output: Path) -> None:
    """Draw the nearest pairs of every network's banks."""
    import matplotlib.pyplot as plt

    found = [(name, np.load(WORK / f"pairs-{name}.npz")) for name in NETWORKS if (WORK / f"pairs-{name}.npz").exists()]
    rows = [(name, bank, pairs[bank]) for name, pairs in found for bank in pairs.files]
    figure, axes = plt.subplots(len(rows), 12, figsize=(9.6, 0.86 * len(rows) + 0.5), squeeze=False)
    for row, (name, bank, triples) in zip(axes, rows, strict=True):
        for place, axis in enumerate(row):
            image = triples[place // 3, place % 3]
            axis.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{name.partition('_')[0]}\n{bank}", rotation=0, ha="right", va="center", fontsize=7)
    for place, axis in enumerate(axes[0]):
        axis.set_title(("sample", "trained", "other")[place % 3], fontsize=7)
    figure.subplots_adjust(left=0.15, right=0.995, top=1 - 0.25 / (0.86 * len(rows) + 0.5), bottom=0.005, wspace=0.05)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=90)


if __name__ == "__main__":
    main()
