"""The whole method in the paper's order: teacher -> samples -> bank -> student -> distillation."""

import copy
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from qimera.assessment.unlabelled import load_images
from qimera.config.bits import parse_bits, parse_layer_bits
from qimera.config.given_images import checked_pixels
from qimera.config.input_spec import InputSpec
from qimera.config.recipe_names import DEFAULT_RECIPE
from qimera.config.recipes import Recipe, recipe as recipe_called
from qimera.config.settings import DistillationSettings, QuantizationSettings, SynthesisSettings, check_start
from qimera.errors import ConfigError
from qimera.machine.acceleration import exact_convolutions, find_device
from qimera.machine.checkpoint import Checkpoint, Checkpoints, State
from qimera.machine.distributed import from_main, gathered, rank, take_state_of_main_, world_size
from qimera.machine.divergence import are_read
from qimera.machine.progress import COMPILING, Progress, ProgressCallback, silent
from qimera.machine.seeds import Stream, check_seed, generator_for
from qimera.mixed_precision.allocation import allocate
from qimera.quantization.ends import with_rules_for_ends
from qimera.student.equalization import restore_limits_
from qimera.student.reconstruction import reconstruct_
from qimera.student.student import Student
from qimera.synthesis.bank import NOTHING_TO_LEARN_FROM, SampleBank, check_bank
from qimera.synthesis.direct import is_step_compiled
from qimera.synthesis.parts import Part, ReportStep, make_part, needs_generator, parts_of
from qimera.synthesis.synthesizer import Synthesizer, SynthesizerTraining
from qimera.teacher.teacher import Teacher, as_teacher
from qimera.training.distillation import distill_
from qimera.training.memory import draws_in_memory, images_in_memory, lessons_in_memory


@torch.inference_mode(False)  # with gradients, also where the caller has switched them off
def synthesize(
    model: nn.Module,
    input_spec: InputSpec | None = None,
    settings: SynthesisSettings | None = None,
    *,
    recipe: str | None = None,
    images: UInt8[Tensor, "image channel height width"] | Path | str | None = None,
    keep_images: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoints: Path | str | None = None,
    progress: ProgressCallback = silent,
) -> SampleBank:
    """Make a bank of synthetic samples of ``model``, enough for every bit width.

    Args:
        model: A trained classifier, or a ``Teacher`` captured from one. It is not changed.
        input_spec: What its images look like; a ``Teacher`` knows already.
        settings: How to make the samples, where no recipe does.
        recipe: Whose samples to make, such as ``best``; ``fast`` where neither is given.
        images: Unlabelled images of yours that join the samples, as pixels from 0 to 255, or where ``load_images``
            finds them. The model's own answers are their labels.
        keep_images: Whether a bank on disk holds these images too; without it, it remembers their hash alone.
        seed: Same seed, settings and machine: same bank, bit for bit, on the CPU. Each batch of samples has a seed of
            its own; its samples are optimised together, towards statistics of them all, so that batches of another size
            hold other samples.
        device: Where generator and images are trained, such as ``cuda``; the bank itself stays in main memory.
        checkpoints: Directory in which to keep what is done, so that the same call goes on there after an
            interruption; it may be removed once the bank is saved.
        progress: Called after every step; on a GPU after every tenth.

    Raises:
        ConfigError: the input spec is missing or not the teacher's own, the model refuses such images, the seed is out
            of range, there is no such recipe, settings are given beside one, your images cannot be read, or there is
            nothing to make a bank of.
        UnsupportedModelError: the model cannot be captured.
        DivergenceError: a loss became NaN or infinite.
    """
    seed = check_seed(seed)
    _refuse_both(settings, recipe)
    teacher = as_teacher(model, input_spec)
    if input_spec not in (None, teacher.input_spec):
        raise ConfigError(
            f"input_spec: the teacher takes images of {teacher.input_spec}, given {input_spec}; leave it out"
        )
    settings = settings or recipe_for(teacher, recipe).synthesis
    if images is None and not settings.num_generated + settings.num_optimized:
        raise ConfigError(NOTHING_TO_LEARN_FROM)
    found = load_images(images, teacher.input_spec) if isinstance(images, Path | str) else images
    given = None if found is None else checked_pixels(found, teacher.input_spec)
    settings = images_in_memory(settings, teacher)
    kept = Checkpoints(checkpoints, "bank", teacher.hash, teacher.input_spec, settings, seed)
    worker = teacher.on(find_device(device))
    trained = _train_generator(worker, settings, seed, kept.of("generator"), progress)
    parts = parts_of(settings, teacher.num_classes, generator_for(seed, Stream.CLASSES))
    made = _make_parts(parts, worker, settings, trained, seed, kept, progress)
    none = {"pixels": torch.empty(0, *teacher.input_spec.shape, dtype=torch.uint8)}
    none["soft_labels"] = torch.empty(0, teacher.num_classes)
    pixels, soft_labels = (torch.cat([none[name], *(part[name] for part in made)]) for name in none)
    bank = SampleBank.from_pixels(pixels, soft_labels, teacher, settings, seed, trained and trained.cpu())
    return bank if given is None else bank.with_images(given, teacher, keep=keep_images)


@torch.inference_mode(False)  # as synthesize
def quantize(
    model: nn.Module,
    bank: SampleBank,
    bits: str = "w4a4",
    *,
    scheme: str = "hardware",
    target: str = "onnxruntime",
    layer_bits: str = "",
    first_last_bits: int = 0,
    budget: str = "",
    settings: DistillationSettings | None = None,
    recipe: str | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoints: Path | str | None = None,
    progress: ProgressCallback = silent,
) -> Student:
    """Return a quantized student of ``model``, trained on ``bank``.

    Args:
        model: The classifier that the bank was made from, or its ``Teacher``. It is not changed.
        bank: From ``synthesize``, or loaded.
        bits: Such as ``w4a8``: weight bits, activation bits, 2 to 8.
        scheme: ``hardware`` (what integer kernels need) or ``paper`` (as GDFQ and Qimera quantize).
        target: Runtime whose kernels decide where tensors are rounded: ``onnxruntime``, ``openvino``, ``inductor``,
            ``xnnpack``, ``litert``, ``litert-builtin`` or ``tflm`` (microcontrollers).
        layer_bits: Exceptions by layer name, such as ``conv1=8,*fc*=w8a4``.
        first_last_bits: Bits of the layers that read the images and of the one that returns the logits, for weights and
            inputs, and of what the first ones return; 0 for those of all others. ``layer_bits`` wins.
        budget: Such as ``size=0.14``; layers that neither of the two decides on get the bits of ``allocate_bits``.
        settings: How to train, where no recipe does.
        recipe: How to train, such as ``ptq`` (not at all); ``fast`` where neither is given.
        seed: Same seed, settings, bank and machine: same student, bit for bit, on the CPU.
        device: Where the student is made and trained, such as ``cuda``; it is returned on the CPU.
        checkpoints: Directory in which to keep what is done, so that the same call goes on there after an
            interruption; it may be removed once the student is saved.
        progress: Called every few steps.

    Raises:
        ConfigError: wrong bits, bits for a layer that is not there, a budget out of reach, or another teacher's bank.
        DivergenceError: a loss became NaN or infinite.
    """
    _refuse_both(settings, recipe)
    weight_bits, activation_bits = parse_bits(bits)
    quantization = QuantizationSettings(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        scheme=scheme,
        target=target,
        layer_bits=parse_layer_bits(layer_bits),
        first_last_bits=first_last_bits,
        budget=budget,
    )
    teacher = as_teacher(model, bank.input_spec)
    if budget:
        check_bank(bank, teacher)
        allocation = allocate(teacher, bank, quantization, seed=seed, progress=progress)
        quantization = quantization.replace(layer_bits=allocation.all_rules)
    settings = settings or recipe_for(teacher, recipe).distillation
    return quantize_with(
        teacher, bank, quantization, settings, seed=seed, device=device, checkpoints=checkpoints, progress=progress
    )


@torch.inference_mode(False)  # as synthesize
def quantize_with(
    teacher: Teacher,
    bank: SampleBank,
    quantization: QuantizationSettings,
    distillation: DistillationSettings,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoints: Path | str | None = None,
    progress: ProgressCallback = silent,
) -> Student:
    """``quantize`` with every setting spelled out."""
    check_bank(bank, teacher)
    seed = check_seed(seed)
    check_start(quantization, distillation)
    quantization = with_rules_for_ends(quantization, teacher)
    if bank.settings.generator.adversarial_weight and not distillation.generator_steps_per_step:
        raise ConfigError("adversarial_weight: works against a student; set generator_steps_per_step to 1 or more")
    if distillation.generator_steps_per_step and bank.synthesizer is None:
        raise ConfigError(
            f"generator_steps_per_step: {distillation.generator_steps_per_step}, but the bank has no generator to "
            "train; set it to 0, or synthesise a bank with generated samples"
        )
    if quantization.budget and not all(quantization.has_rule_for(layer.name) for layer in teacher.layers):
        raise ConfigError("budget: bits are not found yet; give the layer_bits that allocate_bits returns")
    rng = torch.Generator().manual_seed(seed)
    bank_hash = bank.hash if checkpoints else ""  # takes a moment
    kept = Checkpoints(checkpoints, "student", teacher.hash, bank_hash, quantization, distillation, seed).of("student")
    student = Student(teacher, quantization)
    distillation = lessons_in_memory(distillation, student)
    worker, training = teacher.on(find_device(device)), None
    student.to(worker.device)
    with exact_convolutions(worker.device):
        if saved := kept.load():  # the training reads the rest
            restore_limits_(student.reference, saved["reference"])
        else:
            _start_(student, bank, distillation, rng, progress)
    for part in (student.module, student.reference):
        take_state_of_main_(part)
    rng.set_state(from_main(rng.get_state))  # a start that went another way has drawn other numbers
    if distillation.generator_steps_per_step and bank.synthesizer is not None:
        synthesizer = copy.deepcopy(bank.synthesizer).to(worker.device)  # the bank serves other runs as it is
        drawing = draws_in_memory(bank.settings, worker, synthesizer)
        num_steps = distillation.num_steps * distillation.generator_steps_per_step
        training = SynthesizerTraining(synthesizer, worker, drawing, seed, student.module, num_steps)
    distill_(student, worker, bank, distillation, rng, training=training, checkpoint=kept, progress=progress)
    return student.to("cpu")


def _start_(
    student: Student,
    bank: SampleBank,
    distillation: DistillationSettings,
    rng: torch.Generator,
    progress: ProgressCallback,
) -> None:
    """Find the ranges and the integers that ``student`` has before its first step."""
    device, num_samples = student.device, student.settings.num_range_samples
    images = (batch.to(device).images for batch in bank.batches(num_samples, rng))
    if distillation.start == "nearest":
        progress(Progress("ranges", 0, 1))
        student.initialize_ranges_(islice(images, NUM_RANGE_BATCHES))
        progress(Progress("ranges", 1, 1))
        return
    seen, equalize, num_blocks = next(images), distillation.equalize, distillation.reconstructed_blocks
    student.initialize_layers_(seen, rng, equalize=equalize, report=partial(_tell_parts, progress, "rounding"))
    if num_blocks and bank.settings.num_held_out:
        told, held_out = partial(_tell_parts, progress, "reconstruction"), bank.held_out.to(device).images
        reconstruct_(student.module, student.reference, seen, held_out, num_blocks, rng, told)


def _refuse_both(settings: object, recipe: str | None) -> None:
    if settings is not None and recipe is not None:
        raise ConfigError(f"recipe: {recipe} has settings of its own; leave out recipe or settings")


def recipe_for(teacher: Teacher, name: str | None, *, is_alone: bool = True) -> Recipe:
    """Return the recipe called ``name``, or the default one, for this teacher.

    Held-out samples serve estimates, which need batch norms, and the reconstruction of blocks, which layer norms rule
    out. A network that gets neither has none held out. Two kinds of recipes hold them out all the same: those that make
    no other samples, and those that are not ``is_alone``, because the samples choose among several recipes' students.

    Raises:
        ConfigError: there is no such recipe.
    """
    made = recipe_called(name or DEFAULT_RECIPE, teacher.input_spec, teacher.num_classes)
    has_blocks = made.distillation.reconstructed_blocks > 0 and not teacher.layer_norms
    has_others = made.synthesis.num_optimized + made.synthesis.num_generated > 0
    if teacher.batch_norms or has_blocks or not has_others or not is_alone:
        return made
    return replace(made, synthesis=made.synthesis.replace(num_held_out=0))


NUM_RANGE_BATCHES = 4
"""Bank batches that min-max ranges average over; searched ranges look at the first."""


def _train_generator(
    teacher: Teacher,
    settings: SynthesisSettings,
    seed: int,
    checkpoint: Checkpoint,
    progress: ProgressCallback,
) -> Synthesizer | None:
    """Train the generator if any sample needs it."""
    if not needs_generator(settings):
        return None
    synthesizer = Synthesizer(teacher, settings, generator_for(seed, Stream.GENERATOR)).to(teacher.device)
    settings = draws_in_memory(settings, teacher, synthesizer)
    training = SynthesizerTraining(synthesizer, teacher, settings, seed)
    if saved := checkpoint.load():
        training.load_state_dict(saved)
    if training.is_compiled:
        progress(Progress("generator", training.num_steps, settings.generator.num_steps, note=COMPILING))
    with checkpoint.guarding():
        for step in range(training.num_steps + 1, settings.generator.num_steps + 1):
            _tell(progress, "generator", step, settings.generator.num_steps, training.step())
            checkpoint.after_step(training.state_dict)
    take_state_of_main_(synthesizer)  # each process has its own batch-norm statistics
    checkpoint.save(training.state_dict())
    return synthesizer.eval()


def _make_parts(
    parts: list[Part],
    teacher: Teacher,
    settings: SynthesisSettings,
    synthesizer: Synthesizer | None,
    seed: int,
    checkpoints: Checkpoints,
    progress: ProgressCallback,
) -> list[State]:
    """Return pixels and soft labels of every part, those that are finished already from their checkpoints.

    Several processes take turns; what each of them makes does not depend on how many there are.
    """
    own = parts[rank() :: world_size()]
    each = settings.direct.num_steps
    total, before, is_first = each * sum(part.is_optimized for part in own), 0, True
    made: dict[int, State] = {}
    for part in own:
        checkpoint = checkpoints.of(f"part-{part.number:05}", is_shared=False)
        saved = checkpoint.load()
        if "pixels" not in saved:
            if part.is_optimized and is_first:
                wanted = is_step_compiled(settings.direct, part.num_alike * each, len(part.first), teacher)
                note = COMPILING if wanted else ""
                progress(Progress("direct", before + saved.get("step", 0), total, note=note))
                is_first = False
            report = _report(progress, "direct", before, total)
            rng = generator_for(seed, Stream.PARTS, part.number)
            images, soft_labels = make_part(part, teacher, settings, synthesizer, rng, report, checkpoint)
            saved = {"pixels": teacher.input_spec.to_pixels(images).contiguous(), "soft_labels": soft_labels}
            checkpoint.save(saved)
        before += each * part.is_optimized
        made[part.number] = saved
    everywhere = gathered(made)
    return [everywhere[part.number] for part in parts]


def _report(progress: ProgressCallback, stage: str, before: int, total: int) -> ReportStep:
    """Return a callback that counts the steps of one part among those of all parts."""
    return lambda step, losses: _tell(progress, stage, before + step, total, losses)


def _tell_parts(progress: ProgressCallback, stage: str, done: int, total: int) -> None:
    progress(Progress(stage, done, total))


def _tell(progress: ProgressCallback, stage: str, step: int, total: int, losses: dict[str, Tensor]) -> None:
    if are_read(losses, step, total):
        progress(Progress(stage, step, total, {name: float(value) for name, value in losses.items()}))
