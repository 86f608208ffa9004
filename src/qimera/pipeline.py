"""The whole method in the paper's order: teacher -> samples -> bank -> student -> distillation."""

import copy
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from qimera.bits import parse_bits, parse_layer_bits
from qimera.distillation import distill_
from qimera.errors import ConfigError
from qimera.input_spec import InputSpec
from qimera.progress import Progress, ProgressCallback, silent
from qimera.quantization.student import Student
from qimera.recipes import recipe
from qimera.settings import DistillationSettings, QuantizationSettings, SynthesisSettings
from qimera.synthesis.bank import SampleBank
from qimera.synthesis.direct import noise_images, optimize_images
from qimera.synthesis.superposition import draw_mixtures, soft_labels, take_turns
from qimera.synthesis.synthesizer import Synthesizer, SynthesizerTraining
from qimera.teacher import Teacher


def synthesize(
    model: nn.Module,
    input_spec: InputSpec | None = None,
    settings: SynthesisSettings | None = None,
    *,
    seed: int = 0,
    progress: ProgressCallback = silent,
) -> SampleBank:
    """Make a bank of synthetic samples of ``model``, enough for every bit width.

    Args:
        model: A trained classifier, or a ``Teacher`` captured from one. It is not changed.
        input_spec: What its images look like; a ``Teacher`` knows already.
        settings: How to make the samples; the recipe ``fast`` when absent.
        seed: Same seed, settings and machine: same bank, bit for bit, on the CPU.
        progress: Called after every step.

    Raises:
        ConfigError: the input spec is missing or the model refuses such images.
        UnsupportedModelError: the model cannot be captured, or has no batch norm.
        DivergenceError: a loss became NaN or infinite.
    """
    teacher = as_teacher(model, input_spec)
    settings = settings or recipe("fast", teacher.input_spec, teacher.num_classes).synthesis
    generator = torch.Generator().manual_seed(seed)
    synthesizer = _train_generator(teacher, settings, generator, progress)
    generated, optimized = _parts_of(settings)
    first = take_turns(sum(generated + optimized), teacher.num_classes, torch.Generator().manual_seed(seed))
    turns = first.split(generated + optimized)
    images, labels = [], []
    for part in turns[: len(generated)]:
        assert synthesizer is not None
        drawn, soft_label = _generate(synthesizer, part, generator)
        images.append(drawn)
        labels.append(soft_label)
    if optimized:
        progress(Progress("direct", 0, len(optimized) * settings.direct.num_steps))
    for number, part in enumerate(turns[len(generated) :]):
        report = _report(progress, "direct", number, len(optimized), settings.direct.num_steps)
        num_alike = optimized.count(len(part))
        drawn, soft_label = _optimize(part, num_alike, teacher, settings, synthesizer, generator, report)
        images.append(drawn)
        labels.append(soft_label)
    return SampleBank.from_images(torch.cat(images), torch.cat(labels), teacher, settings, seed, synthesizer)


def quantize(
    model: nn.Module,
    bank: SampleBank,
    bits: str = "w4a4",
    *,
    scheme: str = "hardware",
    target: str = "onnxruntime",
    layer_bits: str = "",
    settings: DistillationSettings | None = None,
    seed: int = 0,
    progress: ProgressCallback = silent,
) -> Student:
    """Return a quantized student of ``model``, trained on ``bank``.

    Args:
        model: The classifier that the bank was made from, or its ``Teacher``. It is not changed.
        bank: From ``synthesize``, or loaded.
        bits: Such as ``w4a8``: weight bits, activation bits, 2 to 8.
        scheme: ``hardware`` (what integer kernels need) or ``paper`` (as GDFQ and Qimera quantize).
        target: Runtime whose kernels decide where tensors are rounded: ``onnxruntime``, ``openvino``, ``inductor`` or
            ``xnnpack``.
        layer_bits: Exceptions by layer name, such as ``conv1=8,*fc*=w8a4``.
        settings: How to train; the recipe ``fast`` when absent.
        seed: Same seed, settings, bank and machine: same student, bit for bit, on the CPU.
        progress: Called every few steps.

    Raises:
        ConfigError: wrong bits, or a bank of another teacher.
        DivergenceError: a loss became NaN or infinite.
    """
    weight_bits, activation_bits = parse_bits(bits)
    quantization = QuantizationSettings(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        scheme=scheme,
        target=target,
        layer_bits=parse_layer_bits(layer_bits),
    )
    teacher = as_teacher(model, bank.input_spec)
    settings = settings or recipe("fast", teacher.input_spec, teacher.num_classes).distillation
    return quantize_with(teacher, bank, quantization, settings, seed=seed, progress=progress)


def quantize_with(
    teacher: Teacher,
    bank: SampleBank,
    quantization: QuantizationSettings,
    distillation: DistillationSettings,
    *,
    seed: int = 0,
    progress: ProgressCallback = silent,
) -> Student:
    """``quantize`` with every setting spelled out."""
    check_bank(bank, teacher)
    if bank.settings.generator.adversarial_weight and not distillation.generator_steps_per_step:
        raise ConfigError("adversarial_weight: works against a student; set generator_steps_per_step to 1 or more")
    if quantization.budget and not all(quantization.has_rule_for(layer.name) for layer in teacher.layers):
        raise ConfigError("budget: bits are not found yet; give the layer_bits that allocate_bits returns")
    generator = torch.Generator().manual_seed(seed)
    student = Student(teacher, quantization)
    batches = bank.batches(quantization.num_range_samples, generator)
    if quantization.scheme == "hardware" and distillation.start == "compensated":
        student.initialize_layers_(next(batches).images, generator, equalize=distillation.equalize)
    else:
        student.initialize_ranges_(next(batches).images for _ in range(NUM_RANGE_BATCHES))
    progress(Progress("ranges", 1, 1))
    training = None
    if distillation.generator_steps_per_step and bank.synthesizer is not None:
        synthesizer = copy.deepcopy(bank.synthesizer)  # the bank serves other runs as it is
        training = SynthesizerTraining(synthesizer, teacher, bank.settings, generator, student)
    distill_(student, teacher, bank, distillation, generator, training=training, progress=progress)
    return student


def as_teacher(model: nn.Module, input_spec: InputSpec | None) -> Teacher:
    """Return ``model`` if it is a ``Teacher``, else capture it."""
    if isinstance(model, Teacher):
        return model
    if input_spec is None:
        raise ConfigError("input_spec: missing; pass InputSpec(shape=..., mean=..., std=...) with a plain model")
    return Teacher.capture(model, input_spec)


def check_bank(bank: SampleBank, teacher: Teacher) -> None:
    """Raise ConfigError if ``bank`` is of another teacher, or of other images."""
    if bank.teacher_hash != teacher.hash:
        raise ConfigError(
            f"bank: made for another teacher (hash {bank.teacher_hash[:12]}, this model has {teacher.hash[:12]}); "
            "synthesise a bank for this model and its weights"
        )
    if bank.input_spec != teacher.input_spec:
        raise ConfigError(f"bank: made for images of {bank.input_spec}, this teacher takes {teacher.input_spec}")


NUM_RANGE_BATCHES = 4
"""Bank batches that min-max ranges average over; searched ranges look at the first."""


def _train_generator(
    teacher: Teacher, settings: SynthesisSettings, generator: torch.Generator, progress: ProgressCallback
) -> Synthesizer | None:
    """Train the generator if any sample needs it."""
    if not settings.num_generated and (settings.direct.start != "generator" or not settings.num_optimized):
        return None
    synthesizer = Synthesizer(teacher, settings, generator)
    training = SynthesizerTraining(synthesizer, teacher, settings, generator)
    for step in range(1, settings.generator.num_steps + 1):
        _tell(progress, "generator", step, settings.generator.num_steps, training.step())
    return synthesizer.eval()


def _parts_of(settings: SynthesisSettings) -> tuple[list[int], list[int]]:
    """Return the sizes of the batches that are drawn from the generator, and of those that are optimised.

    Held-out samples are made as the samples before them, in batches of their own, so that those before do not depend
    on how many there are.
    """
    generated = _parts(settings.num_generated, settings.generator.batch_size)
    optimized = _parts(settings.num_optimized, settings.direct.batch_size)
    if optimized:
        return generated, optimized + _parts(settings.num_held_out, settings.direct.batch_size)
    return generated + _parts(settings.num_held_out, settings.generator.batch_size), []


def _parts(total: int, size: int) -> list[int]:
    """Return the sizes of the parts of at most ``size`` that ``total`` splits into; no part is a single sample."""
    count = -(-total // size)
    return [total // count + (index < total % count) for index in range(count)]


@torch.no_grad()
def _generate(
    synthesizer: Synthesizer, first: Int[Tensor, " batch"], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw samples from the generator; return them with their soft labels."""
    images, soft_label = synthesizer(synthesizer.draw(len(first), generator, first))
    return images, soft_label


def _optimize(
    first: Int[Tensor, " batch"],
    num_alike: int,
    teacher: Teacher,
    settings: SynthesisSettings,
    synthesizer: Synthesizer | None,
    generator: torch.Generator,
    report: Callable[[int, dict[str, Tensor]], None],
) -> tuple[Tensor, Tensor]:
    """Optimise one batch of images directly, of ``num_alike``; return them with their soft labels."""
    direct = settings.direct
    if direct.start == "generator" and synthesizer is not None:
        start, soft_label = _generate(synthesizer, first, generator)
    else:
        label, weight = draw_mixtures(first, teacher.num_classes, settings.labels, generator)
        soft_label = soft_labels(label, weight, teacher.num_classes)
        start = noise_images(len(first), teacher.input_spec.shape, direct.num_scales, generator)
    num_calls = num_alike * direct.num_steps
    return optimize_images(start, soft_label, teacher, direct, generator, report, num_calls), soft_label


def _report(
    progress: ProgressCallback, stage: str, part: int, num_parts: int, num_steps: int
) -> Callable[[int, dict[str, Tensor]], None]:
    """Return a callback that counts the steps of one part among those of all parts."""
    return lambda step, losses: _tell(progress, stage, part * num_steps + step, num_parts * num_steps, losses)


def _tell(progress: ProgressCallback, stage: str, step: int, total: int, losses: dict[str, Tensor]) -> None:
    progress(Progress(stage, step, total, {name: float(value) for name, value in losses.items()}))
