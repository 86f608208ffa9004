"""The training of the student: teacher's logits and block outputs on bank and fresh samples."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.assessment.selection import BestState
from qimera.config.settings import DistillationSettings
from qimera.errors import ConfigError
from qimera.graph.nodes import with_outputs
from qimera.machine.acceleration import (
    autocast,
    begin_step,
    compiled,
    exact_convolutions,
    is_compiled,
    narrow_gradients_,
)
from qimera.machine.checkpoint import Checkpoint, State
from qimera.machine.distributed import average_gradients_, own_share, pooled_variances, world_size
from qimera.machine.divergence import check_finite
from qimera.machine.progress import COMPILING, Progress, ProgressCallback, is_reported, silent
from qimera.quantization.losses import block_outputs, feature_loss, kl_loss
from qimera.student.student import Student
from qimera.synthesis.augmentation import blend_at_random, flip_at_random, shift_each
from qimera.synthesis.bank import SampleBank
from qimera.synthesis.samples import Samples
from qimera.synthesis.synthesizer import SynthesizerTraining
from qimera.teacher.teacher import Teacher


def distill_(
    student: Student,
    teacher: Teacher,
    bank: SampleBank,
    settings: DistillationSettings,
    rng: torch.Generator,
    *,
    training: SynthesizerTraining | None = None,
    checkpoint: Checkpoint | None = None,
    progress: ProgressCallback = silent,
) -> None:
    """Train ``student`` for ``settings.num_steps``; its state after the last step is the result (deviation D14).

    With ``settings.select_every``, it is the state of the lowest estimated drop.

    Args:
        student: With ranges already fitted; its ``reference`` is what it should agree with.
        teacher: The student's, by which states are judged.
        bank: Samples of this teacher.
        settings: Schedule, rates and loss weights.
        rng: Draws batches and augmentation.
        training: The generator's training, when it continues beside the student's.
        checkpoint: Keeps the state between steps; from one of the same call the training goes on.
        progress: Called at the start and every ``progress.REPORT_EVERY`` steps.

    Raises:
        ConfigError: fresh samples are asked for and there is no generator, or selection and no held-out samples.
        DivergenceError: a loss term is NaN or infinite.
    """
    course = Course(student, teacher, bank, settings, rng, training)
    checkpoint = checkpoint or Checkpoint()
    if saved := checkpoint.load():
        course.load_state_dict(saved)
    else:
        course.best.consider(0)
    if settings.num_steps:
        note = COMPILING if course.is_compiled else ""
        progress(Progress("distillation", course.num_steps, settings.num_steps, note=note))
    with checkpoint.guarding():
        while course.num_steps < settings.num_steps:
            losses = course.step()
            if is_reported(course.num_steps, settings.num_steps):
                metrics = {name: float(value) for name, value in losses.items()}
                progress(Progress("distillation", course.num_steps, settings.num_steps, metrics))
            checkpoint.after_step(course.state_dict)
    checkpoint.save(course.state_dict())
    course.best.restore_()


class Course:
    """The student's training: all that a step changes."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        bank: SampleBank,
        settings: DistillationSettings,
        rng: torch.Generator,
        training: SynthesizerTraining | None = None,
    ) -> None:
        self.student, self.settings, self.rng, self.training = student, settings, rng, training
        lesson = Lesson(student, settings)
        num_pixels = settings.batch_size * math.prod(bank.input_spec.shape[1:])
        self.is_compiled = is_compiled(settings.compile, settings.num_steps, num_pixels, student.device)
        self._teach = compiled(lesson.teach, self.is_compiled, student.device)
        self._learn = compiled(lesson.losses, self.is_compiled, student.device)
        self._optimizer = _optimizer(student, settings)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: _rate(step, settings))
        self._batches = _Batches(bank, settings, rng, training, student.device, self.is_compiled)
        self.best = BestState(student, teacher, bank, settings)
        self.num_steps = 0

    def step(self) -> dict[str, Tensor]:
        """Train on one batch, after the generator if it trains too; return the loss terms.

        All processes draw the same batch, and each of several learns from its share.

        Raises:
            DivergenceError: a term is NaN or infinite.
            ConfigError: there are more processes than samples in a batch.
        """
        for _ in range(self.settings.generator_steps_per_step if self.training else 0):
            assert self.training is not None
            self.training.step()
        begin_step(self.student.device)
        images, soft_label = next(self._batches)
        num_samples, share = len(images), own_share(len(images))
        images, soft_label = images[share].contiguous(memory_format=torch.channels_last), soft_label[share]
        weight = len(images) * world_size() / num_samples
        target, features = self._teach(images)
        variances = pooled_variances(features, weight)
        with exact_convolutions(images.device):
            total, losses = self._learn(images, soft_label, target, features, variances)
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()
        average_gradients_(self.student.parameters(), weight)
        self._optimizer.step()
        self._schedule.step()
        self.num_steps += 1
        check_finite(losses, self.num_steps, self.settings.num_steps)
        self.best.consider(self.num_steps)
        return losses

    def state_dict(self) -> State:
        """Return what ``load_state_dict`` needs to go on, random generator and teacher's scaled channels included."""
        return {
            "num_steps": self.num_steps,
            "student": self.student.module.state_dict(),
            "reference": self.student.reference.state_dict(),
            "channel_scales": self.student.channel_scales,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "order": self._batches.order,
            "generator": self.rng.get_state(),
            "best": self.best.state_dict(),
            "training": self.training.state_dict() if self.training else None,
        }

    def load_state_dict(self, state: State) -> None:
        """Go back to a state that ``state_dict`` returned."""
        self.num_steps = int(state["num_steps"])
        self.student.module.load_state_dict(state["student"])
        self.student.reference.load_state_dict(state["reference"])
        self.student.channel_scales = dict(state["channel_scales"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._batches.order = state["order"]
        self.rng.set_state(state["generator"])
        self.best.load_state_dict(state["best"])
        if self.training:
            self.training.load_state_dict(state["training"])


class Lesson:
    """What is computed for one batch: the teacher's answer, and how far the student is from it."""

    def __init__(self, student: Student, settings: DistillationSettings) -> None:
        names = block_outputs(student.reference) if settings.feature_weight else []
        self.settings = settings
        self._teacher = with_outputs(student.reference, names)
        self._student = narrow_gradients_(student.with_features(names), settings.precision)

    def teach(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the teacher's logits and block outputs."""
        with torch.no_grad(), autocast(self.settings.precision, images.device):
            logits, features = self._teacher(images)
        return logits, features

    def losses(
        self,
        images: Tensor,
        soft_label: Tensor,
        target: Tensor,
        target_features: list[Tensor],
        variances: list[Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of all terms, and each of them without its weight or gradient.

        The student answers in float32 at every precision: the rounding errors of bfloat16 carry so many sums over the
        edge between two levels that its logits err two thirds as much again as by quantization (ResNet-20, W4A4). Its
        gradients may be narrower.
        """
        settings = self.settings
        logits, features = self._student(images)
        terms = {
            "kl": (settings.kl_weight, kl_loss(logits, target.float(), settings.temperature)),
            "ce": (settings.ce_weight, F.cross_entropy(logits, soft_label)),
            "features": (settings.feature_weight, feature_loss(features, target_features, variances).to(logits.device)),
        }
        terms = {name: (weight, loss) for name, (weight, loss) in terms.items() if weight}
        total = torch.stack([weight * loss for weight, loss in terms.values()]).sum()
        return total, {name: loss.detach() for name, (_, loss) in terms.items()}


class StepwiseAdam(torch.optim.Adam):
    """Adam that moves each quantized weight by the learning rate times its channel's quantizer step.

    Folded batch norms leave channels whose weights differ by orders of magnitude; counted in steps, one rate brings
    each of them as far towards its next integer (deviation D9).
    """

    def __init__(self, groups: list[dict[str, Any]], units: list[tuple[nn.Parameter, Tensor]]) -> None:
        super().__init__(groups, fused=True)
        self.weights: list[Tensor] = [weight for weight, _ in units]
        self.units = [unit for _, unit in units]

    def state_dict(self) -> State:
        """Return moments, rates and the units."""
        return super().state_dict() | {"units": self.units}

    def load_state_dict(self, state_dict: State) -> None:
        """Go back to a state that ``state_dict`` returned."""
        self.units = [unit.to(self.weights[0].device) for unit in state_dict["units"]]
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one step."""
        before = [weight.clone() for weight in self.weights]
        super().step(closure)
        torch._foreach_sub_(self.weights, before)
        torch._foreach_mul_(self.weights, self.units)
        torch._foreach_add_(self.weights, before)


def _optimizer(student: Student, settings: DistillationSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        decayed: list[dict[str, Any]] = [
            {"params": student.weights, "weight_decay": settings.weight_decay},
            {"params": student.steps},  # logarithms: decay would draw every step towards 1
        ]
        return torch.optim.SGD(
            [group for group in decayed if group["params"]],
            settings.weight_learning_rate,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
        )
    units = student.weight_steps()
    quantized = {id(weight) for weight, _ in units}
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight, _ in units], "lr": settings.weight_learning_rate},
        {"params": [each for each in student.weights if id(each) not in quantized], "lr": settings.bias_learning_rate},
        {"params": student.steps, "lr": settings.step_learning_rate},
    ]
    return StepwiseAdam([group for group in groups if group["params"]], units)


def _rate(step: int, settings: DistillationSettings) -> float:
    """Return the factor on the learning rates at this step."""
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / max(1, settings.num_steps)))
    return 0.1 ** sum(step >= milestone for milestone in settings.milestones)


class _Batches(Iterator[tuple[Tensor, Tensor]]):
    """Yields (images, soft labels) without end: augmented bank samples and, in their share, fresh ones."""

    def __init__(
        self,
        bank: SampleBank,
        settings: DistillationSettings,
        rng: torch.Generator,
        training: SynthesizerTraining | None,
        device: torch.device,
        is_compiled: bool,
    ) -> None:
        self._settings, self._rng = settings, rng
        self._num_fresh = round(settings.fresh_share * settings.batch_size)
        self._synthesizer = training.synthesizer if training else bank.synthesizer
        self._device = device
        if self._synthesizer is not None:
            self._synthesize = compiled(self._synthesizer, is_compiled, self._synthesizer.device)
        if self._num_fresh and self._synthesizer is None:
            raise ConfigError(f"fresh_share is {settings.fresh_share}, but the bank has no generator; set it to 0")
        self._num_stored = settings.batch_size - self._num_fresh
        self._stored = bank.batches(self._num_stored, rng)

    @property
    def order(self) -> Tensor:
        """Positions in the bank that are drawn already and not yet used."""
        return self._stored.order

    @order.setter
    def order(self, order: Tensor) -> None:
        self._stored.order = order

    def __next__(self) -> tuple[Tensor, Tensor]:
        images, labels = [], []
        if self._num_stored:
            stored = next(self._stored).to(self._device)
            seen, soft_label = _augment(stored, self._settings, self._rng)
            images.append(seen)
            labels.append(soft_label)
        if self._num_fresh and self._synthesizer is not None:
            with torch.no_grad():
                fresh, soft_label = self._synthesize(self._synthesizer.draw(self._num_fresh, self._rng))
            images.append(fresh.to(self._device))
            labels.append(soft_label.to(self._device))
        return torch.cat(images).contiguous(memory_format=torch.channels_last), torch.cat(labels)


def _augment(
    samples: Samples, settings: DistillationSettings, rng: torch.Generator
) -> tuple[Float[Tensor, "batch channel height width"], Float[Tensor, "batch num_classes"]]:
    images, labels = blend_at_random(samples.images, samples.soft_labels, settings.blend_probability, rng)
    images = flip_at_random(images, rng) if settings.flip else images
    images = shift_each(images, settings.max_shift, rng) if settings.max_shift else images
    return images, labels
