"""A model and labelled images -> how often it is right, and how often it agrees with its teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from qimera.data import LabelledImages
from qimera.errors import ConfigError, DivergenceError, UnsupportedModelError
from qimera.input_spec import InputSpec

Classifier = nn.Module | Callable[[Tensor], Tensor]
"""Normalised images (batch, channel, height, width) -> logits (batch, num_classes)."""

_TOP_K = 5
_MODE_DEPENDENT = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.Dropout, nn.Dropout2d)


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


@torch.inference_mode()
def evaluate(
    model: Classifier,
    data: LabelledImages,
    input_spec: InputSpec,
    *,
    teacher: Classifier | None = None,
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
        ConfigError: no images, a model in training mode, or a class or teacher that the model does not match.
        UnsupportedModelError: the model returns something else than one row of logits per image.
        DivergenceError: a logit is NaN.
    """
    if len(data) == 0:
        raise ConfigError("data: holds no images; give at least one")
    classifiers = {"model": model} if teacher is None else {"model": model, "teacher": teacher}
    for role, classifier in classifiers.items():
        _check_eval_mode(role, classifier)
    rankings: dict[str, list[Tensor]] = {role: [] for role in classifiers}
    done = 0
    for images, labels in data.batches(batch_size):
        inputs = input_spec.normalize(torch.tensor(images).permute(0, 3, 1, 2).contiguous())
        logits = {role: _logits(role, classifier, inputs) for role, classifier in classifiers.items()}
        _check_classes({role: rows.shape[1] for role, rows in logits.items()}, int(labels.max()))
        for role, rows in logits.items():
            rankings[role].append(_ranking(rows))
        done += len(labels)
        if progress is not None:
            progress(done, len(data))
    ranked = {role: torch.cat(parts) for role, parts in rankings.items()}
    return _compare(ranked["model"], ranked.get("teacher"), torch.tensor(data.labels))


def _check_eval_mode(role: str, classifier: Classifier) -> None:
    for name, module in classifier.named_modules() if isinstance(classifier, nn.Module) else ():
        # Exported graphs keep `training` set but hold no such modules; there the flag means nothing.
        if isinstance(module, _MODE_DEPENDENT) and module.training:
            raise ConfigError(
                f"{role}: layer {name or type(module).__name__} is in training mode, where it answers by the batch and "
                f"changes its statistics; call {role}.eval() first"
            )


def _logits(
    role: str, classifier: Classifier, inputs: Float[Tensor, "batch channel height width"]
) -> Float[Tensor, "batch num_classes"]:
    logits = classifier(inputs.to(_device_of(classifier)))
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(inputs):
        given = tuple(logits.shape) if isinstance(logits, Tensor) else f"an object of type {type(logits).__name__}"
        raise UnsupportedModelError(
            f"{role}: must return logits of shape ({len(inputs)}, num_classes) for {len(inputs)} images, but returned "
            f"{given}; wrap it in a module that returns the class logits alone"
        )
    if logits.isnan().any():
        raise DivergenceError(f"{role}: a logit is NaN; look for NaN in its weights, and at mean and std of the input")
    return logits.float().cpu()


def _device_of(classifier: Classifier) -> torch.device:
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
) -> Evaluation:
    top1, top5 = _accuracies(ranking, labels)
    if teacher_ranking is None:
        return Evaluation(len(labels), top1, top5)
    agreement = _percent(ranking[:, 0] == teacher_ranking[:, 0])
    return Evaluation(len(labels), top1, top5, agreement, *_accuracies(teacher_ranking, labels))


def _accuracies(ranking: Int64[Tensor, "batch rank"], labels: Int64[Tensor, " batch"]) -> tuple[float, float | None]:
    hits = ranking == labels.unsqueeze(1)  # (batch, rank)
    top5 = _percent(hits[:, :_TOP_K].any(dim=1)) if ranking.shape[1] > _TOP_K else None
    return _percent(hits[:, 0]), top5


def _percent(hits: Bool[Tensor, " batch"]) -> float:
    return 100 * int(hits.sum()) / len(hits)
