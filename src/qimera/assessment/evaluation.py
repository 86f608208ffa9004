"""A model and labelled images -> how often it is right, and how often it agrees with its teacher."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from qimera.assessment.data import LabelledImages
from qimera.config.input_spec import InputSpec
from qimera.errors import ConfigError, DivergenceError, UnsupportedModelError
from qimera.machine.allocator import reusing_freed_memory

AnyClassifier = nn.Module | Callable[[Tensor], Tensor]
"""Normalised images (batch, channel, height, width) -> logits (batch, num_classes)."""

_TOP_K = 5
_LEAST_KAPPA = 0.05
"""Agreement with the labels, 0 by guessing and 1 at best, below which a network does not know these images."""

_SURE = 2.33
"""Standard deviations above guessing that chance reaches in one of a hundred cases."""

_QUANTILE = 1.645
"""Of the normal distribution, for a two-sided interval of 90 percent."""

_MODE_DEPENDENT = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RReLU)


@dataclass(frozen=True)
class Evaluation:
    """Shares of the evaluated images, in percent."""

    num_images: int
    """Images that the shares are of."""

    top1: float
    """Images whose class has the highest logit."""

    top5: float | None
    """Images whose class is among the five highest logits; None when there are fewer than six classes."""

    agreement: float | None = None
    """Images for which model and teacher predict the same class; None without a teacher."""

    teacher_top1: float | None = None
    """The teacher's ``top1`` on the same images; None without a teacher."""

    teacher_top5: float | None = None
    """The teacher's ``top5`` on the same images; None without a teacher."""

    drop_low: float | None = None
    drop_high: float | None = None
    """Ends of the 90 percent interval of the drop (teacher's ``top1`` minus ``top1``, in points) on all images of which
    these are a sample; None without a teacher."""

    chance: float | None = None
    """The ``top1`` that the teacher's answers would reach if they had nothing to do with the images; None without a
    teacher."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why the drop says nothing; empty where it does."""
        if self.teacher_top1 is None or self.chance is None or not self._is_guessing(self.teacher_top1, self.chance):
            return ()
        return (
            f"data: the full-precision model gets {self.teacher_top1:.1f} % of these {self.num_images:,} images right, "
            f"and guessing {self.chance:.1f} %, so the drop says nothing about quantization; check that the images are "
            "those of this model, the order of their classes, and mean, std and pixel range",
        )

    def _is_guessing(self, top1: float, chance: float) -> bool:
        """Whether Cohen's kappa is next to nothing, or chance alone would often reach as much."""
        if chance >= 100:
            return False
        share, guessed = top1 / 100, chance / 100
        kappa = (share - guessed) / (1 - guessed)
        deviation = math.sqrt(guessed * (1 - guessed) / self.num_images)
        return kappa < _LEAST_KAPPA or share - guessed - 0.5 / self.num_images < _SURE * deviation


@torch.inference_mode()
@reusing_freed_memory()
def evaluate(
    model: AnyClassifier,
    data: LabelledImages,
    input_spec: InputSpec,
    *,
    teacher: AnyClassifier | None = None,
    batch_size: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Return how often ``model`` predicts the class of an image, and how often what ``teacher`` predicts.

    Of equal logits the one of the lower class index counts as higher, for the model as for the teacher.

    Args:
        model: Network in eval mode, or any function from normalised images to logits.
        data: Images and classes, as ``load_labelled_images`` returns them.
        input_spec: How pixels are normalised for the model and the teacher.
        teacher: The full-precision model to compare with.
        batch_size: Images per call of the model; it changes the memory needed, not the result.
        progress: Called after each batch with the number of images done and the number of all.

    Raises:
        ConfigError: no images, or something else than ``LabelledImages``; a model in training mode; or a class or
            teacher that the model does not match.
        UnsupportedModelError: the model returns something else than one row of logits per image.
        DivergenceError: a logit is NaN.
    """
    if not isinstance(data, LabelledImages):
        raise ConfigError(
            f"data: expected LabelledImages, given {type(data).__name__}; give LabelledImages(images, labels), or what "
            "load_labelled_images returns for a path"
        )
    if len(data) == 0:
        raise ConfigError("data: holds no images; give at least one")
    classifiers = {"model": model} if teacher is None else {"model": model, "teacher": teacher}
    for role, classifier in classifiers.items():
        _check_eval_mode(role, classifier)
    rankings: dict[str, list[Tensor]] = {role: [] for role in classifiers}
    done, num_classes = 0, 0
    for images, labels in data.batches(batch_size):
        if images.shape[3] != input_spec.shape[0]:
            raise ConfigError(
                f"data: images of shape {images.shape[1:]} (height, width, channel), but the model takes "
                f"{input_spec.shape[0]} channels"
            )
        inputs = input_spec.normalize(torch.tensor(images).permute(0, 3, 1, 2).contiguous())
        logits = {role: _logits(role, classifier, inputs) for role, classifier in classifiers.items()}
        _check_classes({role: rows.shape[1] for role, rows in logits.items()}, int(labels.max()))
        for role, rows in logits.items():
            rankings[role].append(_ranking(rows))
        done, num_classes = done + len(labels), logits["model"].shape[1]
        if progress is not None:
            progress(done, len(data))
    ranked = {role: torch.cat(parts) for role, parts in rankings.items()}
    return _compare(ranked["model"], ranked.get("teacher"), torch.tensor(data.labels.astype(np.int64)), num_classes)


def _check_eval_mode(role: str, classifier: AnyClassifier) -> None:
    for name, module in classifier.named_modules() if isinstance(classifier, nn.Module) else ():
        # Exported graphs keep `training` set but hold no such modules; there the flag means nothing.
        if isinstance(module, _MODE_DEPENDENT) and module.training:
            raise ConfigError(
                f"{role}: layer {name or type(module).__name__} is in training mode, where it answers by the batch or "
                f"by chance; call {role}.eval() first"
            )


def _logits(
    role: str, classifier: AnyClassifier, inputs: Float[Tensor, "batch channel height width"]
) -> Float[Tensor, "batch num_classes"]:
    logits = classifier(inputs.to(_device_of(classifier)))
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(inputs):
        given = tuple(logits.shape) if isinstance(logits, Tensor) else f"an object of type {type(logits).__name__}"
        raise UnsupportedModelError(
            f"{role}: must return logits of shape ({len(inputs)}, num_classes) for {len(inputs)} images, but returned "
            f"{given}; wrap it in a module that returns only the class logits"
        )
    if logits.isnan().any():
        raise DivergenceError(f"{role}: a logit is NaN; look for NaN in its weights, and at mean and std of the input")
    return logits.float().cpu()


def _device_of(classifier: AnyClassifier) -> torch.device:
    if isinstance(classifier, nn.Module):
        for tensor in chain(classifier.parameters(), classifier.buffers()):
            return tensor.device
    return torch.device("cpu")


def _check_classes(num_classes: dict[str, int], highest_label: int) -> None:
    if len(set(num_classes.values())) > 1:
        raise ConfigError(
            f"teacher: has {num_classes['teacher']} classes, the model has {num_classes['model']}; "
            "give the teacher that the model was made from"
        )
    if highest_label >= num_classes["model"]:
        raise ConfigError(
            f"data: has classes up to {highest_label}, the model has {num_classes['model']} classes; "
            "give images of the classes that the model was trained on, counted from 0"
        )


def _ranking(logits: Float[Tensor, "batch num_classes"]) -> Int64[Tensor, "batch rank"]:
    """Return the classes of the highest logits, best first; one rank more than counted shows that more exist."""
    # A stable sort, because logits of few bits are often equal and topk orders equals at will.
    order = logits.sort(dim=1, descending=True, stable=True).indices
    return order[:, : _TOP_K + 1].clone()


def _compare(
    ranking: Int64[Tensor, "batch rank"],
    teacher_ranking: Int64[Tensor, "batch rank"] | None,
    labels: Int64[Tensor, " batch"],
    num_classes: int,
) -> Evaluation:
    top1, top5 = _accuracies(ranking, labels)
    if teacher_ranking is None:
        return Evaluation(len(labels), top1, top5)
    agreement = _percent(ranking[:, 0] == teacher_ranking[:, 0])
    right, teacher_right = ranking[:, 0] == labels, teacher_ranking[:, 0] == labels
    interval = paired_interval(int((teacher_right & ~right).sum()), int((right & ~teacher_right).sum()), len(labels))
    chance = _chance(teacher_ranking[:, 0], labels, num_classes)
    return Evaluation(len(labels), top1, top5, agreement, *_accuracies(teacher_ranking, labels), *interval, chance)


def paired_interval(num_lost: int, num_won: int, num_images: int) -> tuple[float, float]:
    """Return the ends of the 90 percent interval of the drop, in points.

    Half an image is added to each of the four outcomes, so that few images without a difference do not prove that there
    is none (Agresti and Min 2005, "Simple improved confidence intervals for comparing matched proportions").

    Args:
        num_lost: Images that the teacher gets right and the model does not.
        num_won: Images that the model gets right and the teacher does not.
        num_images: All images.
    """
    lost, won, total = num_lost + 0.5, num_won + 0.5, num_images + 2
    difference = (lost - won) / total
    deviation = math.sqrt(lost + won - (lost - won) ** 2 / total) / total
    return 100 * (difference - _QUANTILE * deviation), 100 * (difference + _QUANTILE * deviation)


def _chance(answers: Int64[Tensor, " batch"], labels: Int64[Tensor, " batch"], num_classes: int) -> float:
    """Return the percent of labels that these answers would meet in any other order; of one class, 1 of all classes."""
    counts, answered = (each.bincount(minlength=num_classes).double() for each in (labels, answers))
    if int((counts > 0).sum()) < 2:
        return 100 / num_classes
    return 100 * float(counts @ answered) / len(labels) ** 2


def _accuracies(ranking: Int64[Tensor, "batch rank"], labels: Int64[Tensor, " batch"]) -> tuple[float, float | None]:
    hits = ranking == labels.unsqueeze(1)  # (batch, rank)
    top5 = _percent(hits[:, :_TOP_K].any(dim=1)) if ranking.shape[1] > _TOP_K else None
    return _percent(hits[:, 0]), top5


def _percent(hits: Bool[Tensor, " batch"]) -> float:
    return 100 * int(hits.sum()) / len(hits)
