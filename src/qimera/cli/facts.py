"""Teachers, banks and recipes -> what commands tell of them."""

from pathlib import Path

from qimera.cli.results import Inspection, LayerFacts, RecipeFacts, Recipes, Synthesis
from qimera.config.input_spec import InputSpec
from qimera.config.recipe_names import RECIPE_NAMES
from qimera.config.recipes import recipe
from qimera.config.settings import QuantizationSettings
from qimera.graph.costs import total_multiply_adds
from qimera.graph.folding import fold_batch_norms
from qimera.graph.nodes import batch_norms
from qimera.quantization.scheme import float_operations, is_integer_product
from qimera.quantization.sizes import float_bytes, packed_bytes
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher


def inspection(model: str, teacher: Teacher, warnings: tuple[str, ...] = ()) -> Inspection:
    """Return what there is to quantize in ``teacher``, which ``model`` names, and to synthesise from."""
    classifier, taps, module = teacher.classifier, teacher.batch_norms, teacher.module
    sizes = {name: QuantizationSettings(weight_bits=bits) for name, bits in {"w8a8": 8, "w4a8": 4, "w4a4": 4}.items()}
    return Inspection(
        model=model,
        teacher=teacher.hash,
        input=teacher.input_spec,
        num_classes=teacher.num_classes,
        classifier=classifier.name,
        num_features=classifier.weight.shape[1],
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        multiply_adds=total_multiply_adds(module),
        num_batch_norms=len(taps),
        num_batch_norm_channels=sum(len(tap.mean) for tap in taps),
        num_exact_batch_norms=len(batch_norms(fold_batch_norms(module))),
        num_products=sum(is_integer_product(node) for node in module.graph.nodes),
        float_operations=dict(float_operations(module).most_common()),
        float_bytes=float_bytes(teacher),
        packed_bytes={name: packed_bytes(teacher, each) for name, each in sizes.items()},
        layers=tuple(
            LayerFacts(name=each.name, kind=each.kind, weight_shape=tuple(each.weight_shape), multiply_adds=each.macs)
            for each in teacher.layers
        ),
        warnings=warnings,
    )


def synthesis(path: Path, form: str, model: str, bank: SampleBank, warnings: tuple[str, ...]) -> Synthesis:
    """Return what is known of ``bank``, written to ``path`` in the format ``form``."""
    return Synthesis(
        bank=str(path),
        format=form,
        model=model,
        teacher=bank.teacher_hash,
        num_samples=bank.num_training - bank.num_images,
        num_images=bank.num_images,
        holds_images=bank.images is not None and bank.images.kept,
        num_held_out=bank.settings.num_held_out,
        hash=bank.hash,
        warnings=warnings,
    )


def recipes_of(shape: tuple[int, int, int], num_classes: int) -> Recipes:
    """Return every recipe as it would be for images of ``shape`` and so many classes."""
    any_pixels = InputSpec(shape=shape, mean=(0.0,) * shape[0], std=(1.0,) * shape[0])
    rows = (recipe(name, any_pixels, num_classes) for name in RECIPE_NAMES)
    facts = tuple(
        RecipeFacts(
            name=row.name,
            description=row.description,
            num_generated=row.synthesis.num_generated,
            num_optimized=row.synthesis.num_optimized,
            num_steps=row.distillation.num_steps,
        )
        for row in rows
    )
    return Recipes(input_shape=shape, num_classes=num_classes, recipes=facts)
