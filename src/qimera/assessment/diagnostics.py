"""A bank and its teacher -> how lifelike, balanced and varied the samples are, and warnings where they are not."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.fx import Node

from qimera.config.base import Settings
from qimera.graph.nodes import aten, classifier_node, node_at, with_outputs
from qimera.synthesis.bank import SampleBank
from qimera.synthesis.losses import channel_moments, safe_sqrt
from qimera.synthesis.superposition import shows_one_class
from qimera.teacher.teacher import BatchNormTap, Teacher, as_teacher

MAX_SAMPLES = 512
"""Samples that a diagnosis looks at; class balance and clipped pixels cover all samples."""

_BATCH = 32

_NEAR_BOUNDARY = 0.5
"""Margin (top-1 minus top-2 probability) below which a sample supports a boundary."""

_DUPLICATE = 0.999
"""Cosine between the pixels of two samples, minus the mean image, above which they differ only by noise."""


class Check(Settings):
    """One property of a bank beside its limit. A bank beyond a limit has a doubt or a remark that says so."""

    is_good: bool
    limit: str
    """What good banks keep, such as ``at least 80 %``."""


class Diagnosis(Settings):
    """What a bank is like; shares are in percent of the samples looked at."""

    num_samples: int
    """All synthetic samples of the bank, held-out ones too."""

    statistics_gap: dict[str, float]
    """By batch norm: squared gap of means and of standard deviations between samples and training data, over the sum
    of both variances, averaged over channels (deviation D7). 0 is perfect, 1 is another kind of data."""

    class_counts: tuple[int, ...]
    """By class: samples whose label gives that class the largest share."""

    superposed: float
    """Samples whose label mixes several classes."""

    recognised: float
    """Single-class samples that the teacher recognises; 0 if there are none."""

    confidence: float
    """Mean of the teacher's top-1 probability on single-class samples, in [0, 1]."""

    near_boundary_superposed: float
    """Superposed samples with a margin below 0.5."""

    near_boundary_single: float
    """Single-class samples with a margin below 0.5."""

    diversity: float | None
    """Mean distance between the features of two samples of the same first class, over that of any two: 0 where all of
    a class look alike, 1 where classes make no difference. None if no two are of one class."""

    near_duplicates: int
    """Samples whose pixels are nearly those of an earlier one."""

    clipped: float
    """Pixels that are black or white, in percent."""

    checks: dict[str, Check] = Field(default_factory=dict)
    """By ``statistics``, ``classes``, ``recognised``, ``boundaries`` and ``variety``; those that do not apply to the
    bank are absent."""

    doubts: tuple[str, ...] = ()
    """Why the samples do not resemble what the network was trained on, and what to do about it; empty where they do.
    Nothing that is measured on samples with doubts tells what happens on real images."""

    remarks: tuple[str, ...] = ()
    """What else could be better, what it does, and what to do about it; empty for a good bank."""

    @property
    def mean_gap(self) -> float:
        """Mean of ``statistics_gap`` over batch norms; 0 where there are none."""
        return sum(self.statistics_gap.values()) / max(1, len(self.statistics_gap))

    @property
    def warnings(self) -> tuple[str, ...]:
        """All doubts and remarks."""
        return self.doubts + self.remarks


@torch.inference_mode()
def diagnose(bank: SampleBank, teacher: nn.Module) -> Diagnosis:
    """Return what the synthetic samples of ``bank`` are like; images of the user's are not looked at.

    Args:
        bank: From ``synthesize``, or loaded.
        teacher: The model that it was made from, or its ``Teacher``.
    """
    teacher = as_teacher(teacher, bank.input_spec)
    bank, untrained = bank.synthetic, untrained_because(teacher)
    if not len(bank):
        return _of_nothing(teacher.num_classes, untrained)
    rng = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(bank), generator=rng)[:MAX_SAMPLES]
    samples = bank.take(chosen)
    gaps, features = _look_at(samples.images, teacher)
    margins = margins_of(samples.logits)
    single = shows_one_class(samples.soft_labels)
    wanted, answer = samples.soft_labels.argmax(1), samples.logits.softmax(1)
    near = margins < _NEAR_BOUNDARY
    values = {
        "num_samples": len(bank),
        "statistics_gap": gaps,
        "class_counts": tuple(bank.soft_labels.argmax(1).bincount(minlength=teacher.num_classes).tolist()),
        "superposed": _percent(~single),
        "recognised": _percent((answer.argmax(1) == wanted)[single]),
        "confidence": float(answer.amax(1)[single].mean()) if bool(single.any()) else 0.0,
        "near_boundary_superposed": _percent(near[~single]),
        "near_boundary_single": _percent(near[single]),
        "diversity": _diversity(features[single], wanted[single]),
        "near_duplicates": _near_duplicates(bank.pixels[chosen]),
        "clipped": _percent((bank.pixels == 0) | (bank.pixels == 255)),
    }
    found = Diagnosis(**values)
    mean_limit = _LARGE_MEAN_GAP if bank.input_spec.has_large_images else _MEAN_GAP
    found = found.replace(checks=_checks(found, mean_limit))
    doubts = (untrained,) if untrained else tuple(_doubts(found, mean_limit))
    return found.replace(doubts=doubts, remarks=tuple(_remarks(found)))


def _of_nothing(num_classes: int, untrained: str) -> Diagnosis:
    """Return what is said of a bank without synthetic samples."""
    shares = ("superposed", "recognised", "confidence", "near_boundary_superposed", "near_boundary_single", "clipped")
    nothing = {"num_samples": 0, "statistics_gap": {}, "diversity": None, "near_duplicates": 0}
    doubts = (untrained,) if untrained else ()
    return Diagnosis(**nothing, **dict.fromkeys(shares, 0.0), class_counts=(0,) * num_classes, doubts=doubts)


def untrained_because(teacher: Teacher) -> str:
    """Return why the network looks untrained; empty for one that does not."""
    fresh = [bool((tap.mean == 0).all() and (tap.var == 1).all()) for tap in teacher.batch_norms]
    if not fresh or not all(fresh):
        return ""
    return (
        f"untrained: the running means of all {len(fresh)} batch norms are 0 and their variances 1, as before any "
        "training; did you forget --weights, or in Python to load the trained weights?"
    )


def _checks(found: Diagnosis, mean_limit: float) -> dict[str, Check]:
    gaps, checks = list(found.statistics_gap.values()), {}
    if gaps:
        is_clipped = found.clipped > _CLIPPED
        is_near = found.mean_gap <= mean_limit and not (is_clipped and max(gaps) > LARGEST_GAP)
        limit = f"at most {mean_limit} on average" + (f" and {LARGEST_GAP} for a layer" if is_clipped else "")
        checks["statistics"] = Check(is_good=is_near, limit=limit)
    if found.num_samples >= 2 * len(found.class_counts):
        checks["classes"] = Check(is_good=0 not in found.class_counts, limit="a sample for every class")
    if found.superposed < 100:
        checks["recognised"] = Check(is_good=found.recognised >= _RECOGNISED, limit=f"at least {_RECOGNISED:.0f} %")
    if found.superposed > 0:
        is_near = found.near_boundary_superposed >= _NEAR
        checks["boundaries"] = Check(is_good=is_near, limit=f"at least {_NEAR:.0f} %")
    most = _DUPLICATES * min(found.num_samples, MAX_SAMPLES)
    checks["variety"] = Check(is_good=found.near_duplicates <= most, limit=f"at most {most:.0f}")
    return checks


def _doubts(found: Diagnosis, mean_limit: float) -> Iterator[str]:
    gaps, failed = found.statistics_gap, _failed(found)
    if not gaps:
        yield (
            "statistics: the network has no batch norms, so nothing tells whether samples resemble what it was trained "
            "on; measure the student on labelled images"
        )
    if "statistics" in failed:
        worst = max(gaps, key=lambda name: gaps[name])
        reasons = (
            "Many pixels are black or white: a wrong mean, std or pixel range is the most common reason; "
            "check them first"
            if found.clipped > _CLIPPED
            else "More synthesis steps bring them closer; if they do not, check mean, std and pixel range"
        )
        yield (
            f"statistics: samples differ from the training data, most before {worst} (gap {gaps[worst]:.2f}, "
            f"{found.mean_gap:.3f} on average; good banks stay below {LARGEST_GAP} and {mean_limit}). {reasons}"
        )
    if "recognised" in failed:
        yield (
            f"classes: the model recognises only {found.recognised:.0f} % of the single-class samples; check mean, std "
            "and pixel range, or raise ce_weight"
        )


def _remarks(found: Diagnosis) -> Iterator[str]:
    failed = _failed(found)
    if "classes" in failed:
        missing = found.class_counts.count(0)
        yield f"classes: {missing} of {len(found.class_counts)} classes have no sample; synthesise the bank anew"
    if "boundaries" in failed:
        yield (
            f"boundaries: only {found.near_boundary_superposed:.0f} % of the superposed samples lie near a boundary; "
            "more synthesis steps bring them there"
        )
    if "variety" in failed:
        yield (
            f"variety: {found.near_duplicates} samples nearly repeat an earlier one; raise noise_scale, or start from "
            "noise"
        )


def _failed(found: Diagnosis) -> set[str]:
    return {name for name, check in found.checks.items() if not check.is_good}


LARGEST_GAP, _MEAN_GAP, _LARGE_MEAN_GAP = 0.1, 0.02, 0.2
"""Of one batch norm, and on average: of small images, and of large ones, which settle slowly. Right mean and std leave
up to 0.119 and 0.016 (ResNet-56 and CIFAR-100, 60 steps), those of 0 and 1 or 0.5 and 0.5 or pixels to 255 at least
0.087 and 0.018; where the largest gap alone is above, many clipped pixels tell wrong ones. After the 30 steps of recipe
ptq at 224 pixels MobileNetV1 is 0.094 off where mean and std are right, and 0.053 where they are 0 and 1, which only
clipped pixels tell; weights that mean nothing leave 0.68 and more (benchmarks/estimation/doubts.py)."""

_CLIPPED = 55.0
"""Percent of black and white pixels from which the reason is likely the range: wrong ones leave 57 and more, right ones
21 to 55 (CIFAR, ImageNet), but for digits."""

_RECOGNISED, _NEAR = 80.0, 10.0
"""Percent of single-class samples that are recognised, and of superposed ones near a boundary; less is a fault."""

_DUPLICATES = 0.05
"""Share of samples from which the rest would teach as much."""


def margins_of(logits: Float[Tensor, "sample num_classes"]) -> Float[Tensor, " sample"]:
    """Return by how much the most probable class is ahead of the second, in [0, 1]."""
    first = logits.softmax(1).topk(2, 1).values
    return first[:, 0] - first[:, 1]


def features_of(
    images: Float[Tensor, "sample channel height width"], teacher: Teacher
) -> Float[Tensor, "sample feature"]:
    """Return what the classifier reads, averaged over positions, on the CPU."""
    return _look_at(images, teacher)[1]


def _look_at(images: Tensor, teacher: Teacher) -> tuple[dict[str, float], Tensor]:
    """Return the gap of every batch norm and the features of all images."""
    classifier = classifier_node(teacher.module, teacher.classifier.name)
    names = [tap.node for tap in teacher.batch_norms]
    watched = with_outputs(teacher.module, [*names, node_at(classifier, 0).name])
    features, moments = [], []
    for part in images.split(_BATCH):
        _, (*entering, feature) = watched(part.to(teacher.device))
        features.append(_averaged(feature, classifier).cpu())
        found = [channel_moments(x) for x in entering]
        moments.append([(len(part) * mean, len(part) * (var + mean.square())) for mean, var in found])
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for index, tap in enumerate(teacher.batch_norms):
        mean = torch.stack([part[index][0] for part in moments]).sum(0) / len(images)
        var = torch.stack([part[index][1] for part in moments]).sum(0) / len(images) - mean.square()
        calls.setdefault(tap.name, []).append((mean, var))
    return {tap.name: _gap(calls[tap.name], tap) for tap in teacher.batch_norms}, torch.cat(features)


def _averaged(feature: Tensor, classifier: Node) -> Tensor:
    """Return the means over positions of what ``classifier`` reads: features are the last axis of a linear layer."""
    if feature.ndim == 2:
        return feature
    return feature.flatten(1, -2).mean(1) if classifier.target is aten.linear.default else feature.flatten(2).mean(2)


def _gap(calls: list[tuple[Tensor, Tensor]], tap: BatchNormTap) -> float:
    """Return the gap of a batch norm, of which the running statistics are averages over all places that call it."""
    mean, var = (torch.stack(each).mean(0) for each in zip(*calls, strict=True))
    gap = (mean - tap.mean).square() + (safe_sqrt(var.clamp(min=0)) - safe_sqrt(tap.var)).square()
    return float((gap / (var + tap.var + 1e-8)).mean())


def _diversity(features: Tensor, classes: Tensor) -> float | None:
    distances = torch.cdist(features, features)
    others = ~torch.eye(len(features), dtype=torch.bool)
    same = (classes[:, None] == classes[None]) & others
    return float(distances[same].mean() / distances[others].mean().clamp(min=1e-12)) if bool(same.any()) else None


def _near_duplicates(pixels: Tensor) -> int:
    rows = pixels.flatten(1).float()
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    return int((rows @ rows.T).tril(-1).amax(1).ge(_DUPLICATE).sum())


def _percent(found: Tensor) -> float:
    return 100 * float(found.float().mean()) if found.numel() else 0.0
