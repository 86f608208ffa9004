"""Named recipes: rows of the papers' tables, and ours."""

from dataclasses import dataclass

from qimera.config.input_spec import InputSpec
from qimera.config.recipe_names import RECIPE_NAMES
from qimera.config.settings import (
    DirectSettings,
    DistillationSettings,
    GeneratorSettings,
    LabelSettings,
    SynthesisSettings,
)
from qimera.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """Settings of both training stages under one name."""

    name: str
    description: str
    synthesis: SynthesisSettings
    distillation: DistillationSettings


def recipe(name: str, input_spec: InputSpec, num_classes: int) -> Recipe:
    """Return the recipe called ``name`` for such images and so many classes.

    Raises:
        ConfigError: there is no such recipe.
    """
    large = input_spec.has_large_images
    match name:
        case "ptq":
            return _ptq(large, num_classes)
        case "fast":
            return _fast(large, num_classes)
        case "best":
            return _best(large, num_classes)
        case "qimera":
            return _qimera(large, num_classes)
        case "paper":
            return _paper(large, num_classes)
        case "gdfq":
            return _gdfq(large, num_classes)
        case "images":
            return _images(large, num_classes)
    raise ConfigError(f"recipe: no recipe called {name!r}; there are {', '.join(RECIPE_NAMES)}")


def _ptq(large: bool, num_classes: int) -> Recipe:
    """Enough samples to see where activations lie and which of them vary together, and no training."""
    return Recipe(
        "ptq",
        "a minute or two, for W4A8 and more: ranges and integers found layer by layer, and no training",
        _optimized(large, 32 if large else 128, 30 if large else 60),
        _distilled(large, num_classes, 0),
    )


def _images(large: bool, num_classes: int) -> Recipe:
    """What ptq makes of images of the user's; samples are only held out, to judge the student by."""
    return Recipe(
        "images",
        "a minute: as ptq, but only from images of yours (--images); samples just judge the student",
        _ptq(large, num_classes).synthesis.replace(num_optimized=0),
        _distilled(large, num_classes, 0).replace(reconstructed_blocks=0),
    )


def _fast(large: bool, num_classes: int) -> Recipe:
    """Minutes on two cores: lifelike images of few steps, many of them superposed, and many student steps."""
    return Recipe(
        "fast",
        "minutes on two CPU cores: directly optimised samples, "
        + ("more of them than ptq, and no training" if large else "logits and block outputs"),
        _optimized(large, *((128, 320) if large else (1024, 160))),
        _distilled(large, num_classes, 0 if large else 8000),
    )


def _best(large: bool, num_classes: int) -> Recipe:
    """The same with more of everything; students of large images lose by training (docs/recipes.md)."""
    return Recipe(
        "best",
        "an hour or more: more samples than fast, "
        + ("and no training" if large else "and four times the student steps"),
        _optimized(large, *((256, 320) if large else (8192, 80))),
        _distilled(large, num_classes, 0 if large else 32000),
    )


def _qimera(large: bool, num_classes: int) -> Recipe:
    """The paper's generator, and what we learned since: its samples are refined directly before a student sees them."""
    generator = GeneratorSettings(num_steps=400, batch_size=32 if large else 64, learning_rate=2e-3)
    synthesis = _optimized(large, *((128, 160) if large else (2048, 40)))
    direct = synthesis.direct.replace(start="generator")
    return Recipe(
        "qimera",
        "as long as fast: superposed samples of a generator, refined directly, "
        + ("and no training" if large else "then the training of fast"),
        synthesis.replace(generator=generator, direct=direct),
        _distilled(large, num_classes, 0 if large else 8000),
    )


def _optimized(large: bool, num_samples: int, num_steps: int) -> SynthesisSettings:
    """Five halvings take 32 pixels down to 2, seven take 224 down to 4."""
    batch_size, num_scales, max_shift = (32, 7, 8) if large else (128, 5, 2)
    direct = DirectSettings(num_steps=num_steps, batch_size=batch_size, num_scales=num_scales, max_shift=max_shift)
    return SynthesisSettings(num_optimized=num_samples, num_held_out=_held_out(large), direct=direct)


def _held_out(large: bool) -> int:
    return 32 if large else 128


def _distilled(large: bool, num_classes: int, num_steps: int) -> DistillationSettings:
    """The start suits the steps, the temperature the teacher's second thoughts: 100 classes have more than 10."""
    batch_size, max_shift = (8, 16) if large else (16, 4)
    return DistillationSettings(
        num_steps=num_steps,
        start="nearest" if num_steps else "compensated",
        reconstructed_blocks=_RECONSTRUCTED_BLOCKS if large and not num_steps else 0,
        batch_size=batch_size,
        max_shift=max_shift,
        temperature=2.0 if num_classes < 50 else 3.0,
    )


_RECONSTRUCTED_BLOCKS = 5
"""With large images, where students are not trained (docs/recipes.md)."""


def _paper(large: bool, num_classes: int) -> Recipe:
    """Choi et al. 2021 and their released settings: CIFAR-10 K=2, CIFAR-100 K=10, ImageNet K=100; p=0.4."""
    k = 2 if num_classes <= 10 else 10 if num_classes <= 100 else 100
    labels = LabelSettings(superposition_probability=0.4, num_superposed_classes=k, per_sample=False)
    return Recipe(
        "paper",
        "Qimera as published: generator and student in turns, 400 epochs of 200 steps",
        _published_synthesis(large, labels, GeneratorSettings()),
        _published_distillation(large, num_classes),
    )


def _gdfq(large: bool, num_classes: int) -> Recipe:
    """Xu et al. 2020: the same generator without superposition, mapping or extracted embeddings."""
    generator = GeneratorSettings(extracted_embeddings=False, disentanglement_mapping=False)
    return Recipe(
        "gdfq",
        "GDFQ as published: single classes, random embeddings, no mapping",
        _published_synthesis(large, LabelSettings(superposition=False), generator),
        _published_distillation(large, num_classes),
    )


_EPOCH = 200
"""Steps per epoch in GDFQ and Qimera."""


def _published_synthesis(large: bool, labels: LabelSettings, generator: GeneratorSettings) -> SynthesisSettings:
    warm_up, batch_size = (50, 16) if large else (4, 200)
    published = {
        "num_steps": warm_up * _EPOCH,
        "batch_size": batch_size,
        "learning_rate": 1e-3,
        "base_channels": 128,
        "num_doublings": 2,
        "ce_weight": 1.0,
        "bns_weight": 0.1,
        "relative_bns": False,
        "layer_norm_weight": 0.0,
        "attention_weight": 0.0,
        "sum_of_scales": False,
        "tv_weight": 0.0,
        "max_shift": 0,
        "milestones": (100 * _EPOCH, 200 * _EPOCH, 300 * _EPOCH),
    }
    return SynthesisSettings(
        num_generated=4 * 256,
        num_optimized=0,
        num_held_out=_held_out(large),
        labels=labels,
        generator=generator.model_copy(update=published),
    )


def _published_distillation(large: bool, num_classes: int) -> DistillationSettings:
    """T=20 and alpha=1 with a mean over classes: 1/C in our per-sample unit (deviation D5)."""
    warm_up, batch_size, rate = (50, 16, 1e-6) if large else (4, 200, 1e-4)
    return DistillationSettings(
        num_steps=(400 - warm_up) * _EPOCH,
        batch_size=batch_size,
        optimizer="sgd",
        weight_learning_rate=rate,
        weight_decay=1e-4,
        schedule="milestones",
        milestones=tuple((epoch - warm_up) * _EPOCH for epoch in (100, 200, 300)),
        kl_weight=1 / num_classes,
        temperature=20.0,
        ce_weight=1.0,
        feature_weight=0.0,
        fresh_share=1.0,
        generator_steps_per_step=1,
        blend_probability=0.0,
        max_shift=0,
        flip=False,
    )
