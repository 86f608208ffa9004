"""What a user typed -> the captured teacher and the settings of a run."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from qimera.assessment.unlabelled import load_images
from qimera.cli.arguments import ModelOptions, RunOptions
from qimera.config.base import Settings
from qimera.config.bits import parse_bits, parse_layer_bits
from qimera.config.given_images import GivenImages
from qimera.config.input_spec import InputSpec
from qimera.config.recipe_names import DEFAULT_RECIPE
from qimera.config.recipes import Recipe
from qimera.config.run_settings import RunSettings
from qimera.config.settings import QuantizationSettings, SynthesisSettings
from qimera.errors import ConfigError
from qimera.pipeline import recipe_for
from qimera.quantization.ends import with_rules_for_ends
from qimera.synthesis.bank import SampleBank
from qimera.teacher.sources import absolute_source, known_input, load_model
from qimera.teacher.teacher import Teacher

_S = TypeVar("_S", bound=Settings)

DEFAULT_BITS = "w4a4"


def capture(options: ModelOptions, *, untrained: bool = False) -> Teacher:
    """Load the model and capture it; with ``untrained``, also an architecture without weights.

    Raises:
        ConfigError: an option is missing or wrong, or the model and its weights do not fit.
        UnsupportedModelError: the model cannot be captured.
    """
    if options.model is None:
        raise ConfigError(
            "MODEL: missing; give file.py:function, module.path:function, timm:NAME, torchvision:NAME, hf-hub:REPO, "
            "program.pt2, mnist_cnn, mnist_vit or mnist_convnext"
        )
    model = load_model(options.model, options.weights, untrained=untrained)
    input_spec = _input_spec(options, options.model, model)
    return Teacher.capture(model, input_spec, options.logits or "")


def _input_spec(options: ModelOptions, source: str, model: nn.Module) -> InputSpec:
    """Return what the options say, completed by what the model knows of its input."""
    given: dict[str, Any] = {}
    if options.input_shape is not None:
        given["shape"] = shape_of(options.input_shape)
    for name in ("mean", "std", "pixel_range"):
        if (text := getattr(options, name)) is not None:
            given[name] = _floats(_OPTIONS[name], text)
    values = {**known_input(source, model), **given}
    missing = [_OPTIONS[name] for name in ("shape", "mean", "std") if name not in values]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: missing; {source} does not say what its images look like")
    with naming_options():
        spec = InputSpec(**values)
    return spec


def _quantization(options: RunOptions) -> QuantizationSettings:
    """Return what is quantized at how many bits."""
    weight_bits, activation_bits = parse_bits(options.bits or DEFAULT_BITS)
    if options.scheme == "paper" and options.target is not None:
        raise ConfigError(f"--target: {options.target} is for --scheme hardware, given --scheme paper; leave one out")
    return QuantizationSettings(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        layer_bits=parse_layer_bits(options.layer_bits or ""),
        first_last_bits=options.first_last_bits or 0,
        scheme=options.scheme or "hardware",
        target=options.target or "onnxruntime",
        budget=options.budget or "",
    )


@dataclass(frozen=True)
class Resolved:
    """Everything that a run starts from."""

    settings: RunSettings
    teacher: Teacher
    bank: SampleBank | None
    """The bank that the settings name, with the user's images in it; None when the run makes its own."""
    images: Tensor | None = None
    """Pixels of the user's images."""


def resolve(model_options: ModelOptions, options: RunOptions) -> Resolved:
    """Return the settings that the options spell, with every path absolute, and what they name.

    Raises:
        ConfigError: an option is missing or wrong.
        UnsupportedModelError: the model cannot be captured.
    """
    quantization = _quantization(options)
    teacher = capture(model_options)
    row, *others = recipes_for(teacher, options.recipe)
    if options.bank is not None and options.keep_images:
        raise ConfigError(
            f"--keep-images: {options.bank} is made already; leave it out, or give qimera synthesize --bank "
            f"{options.bank} --images PATH --keep-images"
        )
    images, bank = images_and_bank(teacher, options.images, options.bank, options.keep_images)
    if "images" in (row.name, *(each.name for each in others)) and (count := _num_samples(row, bank)):
        raise ConfigError(
            f"--recipe: images makes a student only from your images, but there are {count} samples of "
            f"{options.bank or row.name} too; give ptq, which learns from both"
        )
    own = None if images is None else GivenImages.of(images, kept=bool(options.keep_images))
    assert model_options.model is not None
    settings = RunSettings(
        model=absolute_source(model_options.model),
        weights=_absolute(model_options.weights),
        recipe=",".join(each.name for each in (row, *others)),
        seed=options.seed or 0,
        bank=_absolute(options.bank),
        images=own if bank is None else bank.images,
        logits=model_options.logits or "",
        input=teacher.input_spec,
        synthesis=row.synthesis if bank is None else bank.settings,
        quantization=quantization,
        distillation=row.distillation,
        alternatives=tuple(each.distillation for each in others),
    )
    return Resolved(_with_every_rule(_changed(settings, options), teacher), teacher, bank, images)


def _num_samples(first: Recipe, bank: SampleBank | None) -> int:
    """Return how many synthetic samples students would learn from."""
    if bank is not None:
        return bank.num_training - bank.num_images
    return first.synthesis.num_generated + first.synthesis.num_optimized


def _with_every_rule(settings: RunSettings, teacher: Teacher) -> RunSettings:
    return settings.replace(quantization=with_rules_for_ends(settings.quantization, teacher))


def images_and_bank(
    teacher: Teacher, images: Path | None, bank: Path | None, keep_images: bool | None = None
) -> tuple[Tensor | None, SampleBank | None]:
    """Return the pixels that ``--images`` names, and the bank that ``--bank`` names with those images in it.

    Raises:
        ConfigError: one of them cannot be read, they do not fit together, or there is nothing to keep.
    """
    if keep_images and images is None:
        raise ConfigError("--keep-images: there are no images to keep; add --images, or leave it out")
    pixels = None if images is None else load_images(images, teacher.input_spec)
    made = None if bank is None else SampleBank.load(bank, teacher)
    if made is not None and pixels is not None:
        made = made.with_images(pixels, teacher, keep=bool(keep_images))
    return pixels, made


_PLACES = {"labels": "synthesis", "generator": "synthesis", "direct": "synthesis"}
"""Groups of settings that may be named without the group that contains them."""


def _changed(settings: RunSettings, options: RunOptions) -> RunSettings:
    """Return the settings with what ``--set`` and ``--steps`` say.

    Raises:
        ConfigError: there is no such setting, its value is wrong, or a bank made earlier has another.
    """
    steps = [] if options.steps is None else [("--steps", f"distillation.num_steps={options.steps}")]
    for option, text in [*steps, *(("--set", text) for text in options.set_ or [])]:
        name, path, value = _parsed(text, ("synthesis", "quantization", "distillation"), "distillation.temperature=2")
        if settings.alternatives and path[0] == "distillation":
            raise ConfigError(f"{option}: {name} is for one recipe, given {settings.recipe}; choose one of them")
        changed = _with_change(settings, option, path, value)
        if options.bank is not None and changed.synthesis != settings.synthesis:
            raise ConfigError(f"--set: {name} differs from the bank; leave out --bank, or leave {name} out")
        settings = changed
    return settings


def _parsed(text: str, groups: tuple[str, ...], example: str) -> tuple[str, list[str], object]:
    """``"labels.superposition=false"`` -> (its name, ["synthesis", "labels", "superposition"], False).

    Raises:
        ConfigError: there is no value, or the setting is in none of the ``groups``.
    """
    name, given, value = text.partition("=")
    path = name.strip().split(".")
    path = [_PLACES[path[0]], *path] if path[0] in _PLACES else path
    if not given or len(path) < 2 or path[0] not in groups:
        raise ConfigError(f"--set: expected NAME=VALUE such as labels.superposition=false or {example}, given {text!r}")
    return name, path, _value_of(value)


def _value_of(text: str) -> object:
    """Return a number, true, false, a list, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _with_change(settings: _S, option: str, path: list[str], value: object) -> _S:
    try:
        return _with_value(settings, path, value)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from None


def _with_value(settings: _S, path: list[str], value: object) -> _S:
    first, *rest = path
    inner = getattr(settings, first, None)
    return settings.replace(
        **{first: _with_value(inner, rest, value) if rest and isinstance(inner, Settings) else value}
    )


def read_settings(path: Path, model_options: ModelOptions, options: RunOptions) -> Resolved:
    """Return the settings in ``path``, to which no option but ``--images`` may be added, and what they name.

    Raises:
        ConfigError: there is no such file, something in it is wrong, another option was given too, or images that the
            settings do not remember.
        UnsupportedModelError: the model cannot be captured.
    """
    typed = [
        field.name
        for part in (model_options, options)
        for field in fields(part)
        if field.name != "images" and getattr(part, field.name) not in (None, [])
    ]
    if typed:
        names = ", ".join("MODEL" if name == "model" else f"--{name.strip('_').replace('_', '-')}" for name in typed)
        raise ConfigError(f"--settings: {path} holds every setting of a run; leave out {names}, or edit the file")
    if not path.is_file():
        raise ConfigError(f"--settings: no such file: {path}; give the settings.json of a run")
    settings = RunSettings.load(path)
    model = load_model(settings.model, Path(settings.weights) if settings.weights else None)
    teacher = Teacher.capture(model, settings.input, settings.logits)
    images, bank = images_and_bank(teacher, options.images, Path(settings.bank) if settings.bank else None)
    given = None if images is None else GivenImages.of(images)
    if given and not (settings.images and settings.images.sha256 == given.sha256):
        remembered = settings.images.text() if settings.images else "none"
        raise ConfigError(f"--images: {path} remembers {remembered}, given {given.text()}")
    try:
        return Resolved(_with_every_rule(settings, teacher), teacher, bank, images)
    except ConfigError as error:
        raise ConfigError(f"--settings: {path}: {error}") from None


def recipes_for(teacher: Teacher, names: str | None) -> list[Recipe]:
    """Return the recipes called ``names``, with commas between, or the default one, for this teacher.

    Raises:
        ConfigError: there is no such recipe, or one is named twice.
    """
    chosen = [name.strip() for name in (DEFAULT_RECIPE if names is None else names).split(",")]
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"--recipe: each can be named once, given {names}")
    return [recipe_for(teacher, name, is_alone=len(chosen) == 1) for name in chosen]


def settings_of_bank(teacher: Teacher, names: str | None, changes: list[str] | None) -> SynthesisSettings:
    """Return the settings of the recipe called ``names``, or the default one, with what ``--set`` says.

    Raises:
        ConfigError: there is no such recipe, there are several, or a change is wrong.
    """
    first, *others = recipes_for(teacher, names)
    if others:
        raise ConfigError(
            f"--recipe: a bank is made by one recipe, given {names}; give {first.name}, which makes the bank when "
            "`qimera quantize` is given these"
        )
    settings = first.synthesis
    for text in changes or []:
        _, path, value = _parsed(text, ("synthesis",), "synthesis.num_optimized=512")
        settings = _with_change(settings, "--set", path[1:], value)
    return settings


def shape_of(text: str) -> tuple[int, int, int]:
    """``"3,32,32"`` -> (3, 32, 32).

    Raises:
        ConfigError: not three whole numbers.
    """
    try:
        channels, height, width = (int(part) for part in text.split(","))
    except ValueError:
        message = f"--input-shape: expected channels, height and width such as 3,224,224, given {text!r}"
        raise ConfigError(message) from None
    return channels, height, width


_OPTIONS = {"shape": "--input-shape", "mean": "--mean", "std": "--std", "pixel_range": "--pixel-range"}
"""By the setting of ``InputSpec`` that each gives."""


@contextmanager
def naming_options() -> Iterator[None]:
    """Let an error of ``InputSpec`` call its settings as the command line calls them.

    Raises:
        ConfigError: that error.
    """
    try:
        yield
    except ConfigError as error:
        said, names = str(error).removeprefix("InputSpec: "), r"(?<!you )\b(shape|mean|std|pixel_range)\b"
        raise ConfigError(re.sub(names, lambda found: _OPTIONS[found[0]], said)) from None


def _floats(option: str, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise ConfigError(f"{option}: expected numbers with commas between, such as 0.485,0.456,0.406, given {text!r}")
    return values


def _absolute(path: Path | None) -> str:
    return "" if path is None else str(path.resolve())
