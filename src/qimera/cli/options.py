"""What a user typed -> the captured teacher and the settings of a run."""

import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from qimera.cli.arguments import ModelOptions, RunOptions
from qimera.config.base import Settings
from qimera.config.bits import parse_bits, parse_layer_bits
from qimera.config.input_spec import InputSpec
from qimera.config.recipe_names import DEFAULT_RECIPE
from qimera.config.recipes import Recipe, recipe
from qimera.config.run_settings import RunSettings
from qimera.config.settings import QuantizationSettings
from qimera.errors import ConfigError
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
    try:
        return InputSpec(**values)
    except ConfigError as error:
        raise ConfigError(_with_options(str(error).removeprefix("InputSpec: "))) from None


def _quantization(options: RunOptions) -> QuantizationSettings:
    """Return what is quantized at how many bits."""
    weight_bits, activation_bits = parse_bits(options.bits or DEFAULT_BITS)
    if options.scheme == "paper" and options.target is not None:
        raise ConfigError(f"--target: {options.target} is for --scheme hardware, given --scheme paper; leave one out")
    return QuantizationSettings(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        layer_bits=parse_layer_bits(options.layer_bits or ""),
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
    """The bank that the settings name; None when the run makes its own."""


def resolve(model_options: ModelOptions, options: RunOptions) -> Resolved:
    """Return the settings that the options spell, with every path absolute, and what they name.

    Raises:
        ConfigError: an option is missing or wrong.
        UnsupportedModelError: the model cannot be captured.
    """
    quantization = _quantization(options)
    teacher = capture(model_options)
    row, *others = recipes_for(teacher, options.recipe)
    bank = None if options.bank is None else SampleBank.load(options.bank, teacher)
    assert model_options.model is not None
    settings = RunSettings(
        model=absolute_source(model_options.model),
        weights=_absolute(model_options.weights),
        recipe=",".join(each.name for each in (row, *others)),
        seed=options.seed or 0,
        bank=_absolute(options.bank),
        logits=model_options.logits or "",
        input=teacher.input_spec,
        synthesis=row.synthesis if bank is None else bank.settings,
        quantization=quantization,
        distillation=row.distillation,
        alternatives=tuple(each.distillation for each in others),
    )
    return Resolved(_changed(settings, options), teacher, bank)


_PLACES = {"labels": "synthesis", "generator": "synthesis", "direct": "synthesis"}
"""Groups of settings that may be named without the group that contains them."""


def _changed(settings: RunSettings, options: RunOptions) -> RunSettings:
    """Return the settings with what ``--set`` and ``--steps`` say.

    Raises:
        ConfigError: there is no such setting, its value is wrong, or a bank made earlier has another.
    """
    steps = [] if options.steps is None else [f"distillation.num_steps={options.steps}"]
    for text in [*steps, *(options.set_ or [])]:
        name, given, value = text.partition("=")
        path = name.strip().split(".")
        path = [_PLACES[path[0]], *path] if path[0] in _PLACES else path
        if not given or len(path) < 2 or path[0] not in ("synthesis", "quantization", "distillation"):
            raise ConfigError(
                "--set: expected NAME=VALUE such as labels.superposition=false or distillation.temperature=2, "
                f"given {text!r}"
            )
        if settings.alternatives and path[0] == "distillation":
            raise ConfigError(f"--set: {name} is for one recipe, given {settings.recipe}; choose one of them")
        try:
            changed = _with_value(settings, path, _value_of(value))
        except ConfigError as error:
            raise ConfigError(f"--set: {error}") from None
        if options.bank is not None and changed.synthesis != settings.synthesis:
            raise ConfigError(f"--set: {name} differs from the bank; leave out --bank, or leave {name} out")
        settings = changed
    return settings


def _value_of(text: str) -> object:
    """Return a number, true, false, a list, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _with_value(settings: _S, path: list[str], value: object) -> _S:
    first, *rest = path
    inner = getattr(settings, first, None)
    return settings.replace(
        **{first: _with_value(inner, rest, value) if rest and isinstance(inner, Settings) else value}
    )


def read_settings(path: Path, model_options: ModelOptions, options: RunOptions) -> Resolved:
    """Return the settings in ``path``, to which no option may be added, and what they name.

    Raises:
        ConfigError: there is no such file, something in it is wrong, or another option was given too.
        UnsupportedModelError: the model cannot be captured.
    """
    typed = [
        field.name
        for part in (model_options, options)
        for field in fields(part)
        if getattr(part, field.name) not in (None, [])
    ]
    if typed:
        names = ", ".join("MODEL" if name == "model" else f"--{name.strip('_').replace('_', '-')}" for name in typed)
        raise ConfigError(f"--settings: {path} holds every setting of a run; leave out {names}, or edit the file")
    if not path.is_file():
        raise ConfigError(f"--settings: no such file: {path}; give the settings.json of a run")
    settings = RunSettings.load(path)
    model = load_model(settings.model, Path(settings.weights) if settings.weights else None)
    teacher = Teacher.capture(model, settings.input, settings.logits)
    bank = SampleBank.load(Path(settings.bank), teacher) if settings.bank else None
    return Resolved(settings, teacher, bank)


def recipes_for(teacher: Teacher, names: str | None) -> list[Recipe]:
    """Return the recipes called ``names``, with commas between, or the default one, for this teacher.

    Raises:
        ConfigError: there is no such recipe, or one is named twice.
    """
    chosen = [name.strip() for name in (DEFAULT_RECIPE if names is None else names).split(",")]
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"--recipe: each can be named once, given {names}")
    return [recipe(name, teacher.input_spec, teacher.num_classes) for name in chosen]


def recipe_of_bank(teacher: Teacher, names: str | None) -> Recipe:
    """Return the recipe called ``names``, or the default one, by which a bank is made.

    Raises:
        ConfigError: there is no such recipe, or there are several.
    """
    first, *others = recipes_for(teacher, names)
    if others:
        raise ConfigError(
            f"--recipe: a bank is made by one recipe, given {names}; give {first.name}, which makes the bank when "
            "`qimera quantize` is given these"
        )
    return first


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


def _with_options(message: str) -> str:
    """Return what ``InputSpec`` says with its settings called as the command line calls them."""
    return re.sub(r"(?<!you )\b(shape|mean|std|pixel_range)\b", lambda found: _OPTIONS[found[0]], message)


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
