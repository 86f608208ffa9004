import pytest
import torch

from qimera.config.input_spec import InputSpec
from qimera.config.recipe_names import RECIPE_NAMES
from qimera.config.recipes import recipe
from qimera.config.settings import LabelSettings
from qimera.errors import ConfigError
from qimera.pipeline import quantize, synthesize
from qimera.quantization.losses import kl_loss
from qimera.teacher.teacher import Teacher
from tests.networks import SPEC, toy_pixels

CIFAR = InputSpec(shape=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
IMAGENET = InputSpec(shape=(3, 224, 224), mean=(0.5,) * 3, std=(0.25,) * 3)
SETTINGS = [(CIFAR, 10), (CIFAR, 100), (IMAGENET, 1000)]


@pytest.mark.parametrize("name", RECIPE_NAMES)
@pytest.mark.parametrize(("spec", "num_classes"), SETTINGS)
def test_every_recipe_has_settings_for_every_data_set(name: str, spec: InputSpec, num_classes: int) -> None:
    made = recipe(name, spec, num_classes)
    assert made.name == name
    assert made.description
    num_samples = made.synthesis.num_generated + made.synthesis.num_optimized
    assert num_samples == 0 if name == "images" else num_samples >= 2


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="no recipe called 'quick'; there are ptq, fast, best, qimera, paper, gdfq, images"
    ):
        recipe("quick", CIFAR, 10)


@pytest.mark.parametrize(
    ("spec", "num_classes", "k", "warm_up", "batch", "rate"),
    [(CIFAR, 10, 2, 4, 200, 1e-4), (CIFAR, 100, 10, 4, 200, 1e-4), (IMAGENET, 1000, 100, 50, 16, 1e-6)],
)
def test_the_paper_recipe_has_the_published_settings(
    spec: InputSpec, num_classes: int, k: int, warm_up: int, batch: int, rate: float
) -> None:
    """400 epochs of 200 steps, the first ones for the generator alone; p = 0.4; rates divided by ten three times."""
    made = recipe("paper", spec, num_classes)
    labels, generator, student = made.synthesis.labels, made.synthesis.generator, made.distillation
    assert labels == LabelSettings(superposition_probability=0.4, num_superposed_classes=k, per_sample=False)
    assert generator.disentanglement_mapping
    assert generator.extracted_embeddings
    assert generator.num_steps == warm_up * 200
    assert generator.num_steps + student.num_steps == 400 * 200
    assert generator.batch_size == student.batch_size == batch
    assert (generator.learning_rate, generator.ce_weight, generator.bns_weight) == (1e-3, 1.0, 0.1)
    assert not generator.relative_bns
    assert generator.milestones == (20_000, 40_000, 60_000)
    assert student.milestones == tuple((epoch - warm_up) * 200 for epoch in (100, 200, 300))
    assert (student.optimizer, student.weight_learning_rate, student.weight_decay) == ("sgd", rate, 1e-4)
    assert (student.momentum, student.temperature, student.ce_weight) == (0.9, 20, 1)
    assert (student.fresh_share, student.generator_steps_per_step) == (1, 1)
    assert (student.feature_weight, student.blend_probability, student.max_shift, student.flip) == (0, 0, 0, False)


@pytest.mark.parametrize(("spec", "num_classes"), SETTINGS)
def test_qimera_refines_superposed_samples_of_the_whole_generator_and_trains_as_fast_does(
    spec: InputSpec, num_classes: int
) -> None:
    made = recipe("qimera", spec, num_classes)
    assert made.synthesis.num_optimized
    assert made.synthesis.direct.start == "generator"
    assert made.synthesis.labels == LabelSettings()
    generator = made.synthesis.generator
    assert generator.disentanglement_mapping
    assert generator.extracted_embeddings
    assert generator.num_steps
    assert made.distillation == recipe("fast", spec, num_classes).distillation


@pytest.mark.parametrize("num_classes", [10, 100, 1000])
def test_the_paper_recipe_weighs_knowledge_as_the_released_code_does(num_classes: int) -> None:
    """There the divergence is averaged over classes too, times alpha = 1 and the square of T = 20 (deviation D5)."""
    settings = recipe("paper", CIFAR, num_classes).distillation
    rng = torch.Generator().manual_seed(0)
    student, teacher = (5 * torch.randn(6, num_classes, generator=rng) for _ in range(2))
    released = (
        torch.nn.functional.kl_div((student / 20).log_softmax(1), (teacher / 20).softmax(1), reduction="none").mean()
        * 20**2
    )
    ours = settings.kl_weight * kl_loss(student, teacher, settings.temperature)
    torch.testing.assert_close(ours, released, rtol=1e-4, atol=1e-7)  # float32, other order


@pytest.mark.parametrize(("spec", "num_classes"), SETTINGS)
def test_gdfq_is_the_paper_recipe_without_superposition_mapping_and_extracted_embeddings(
    spec: InputSpec, num_classes: int
) -> None:
    paper, gdfq = recipe("paper", spec, num_classes), recipe("gdfq", spec, num_classes)
    assert gdfq.distillation == paper.distillation
    assert not gdfq.synthesis.labels.superposition
    differing = {
        name
        for name, value in paper.synthesis.generator.model_dump().items()
        if getattr(gdfq.synthesis.generator, name) != value
    }
    assert differing == {"disentanglement_mapping", "extracted_embeddings"}


@pytest.mark.parametrize("name", RECIPE_NAMES)
@pytest.mark.parametrize(("spec", "num_classes"), SETTINGS)
def test_every_recipe_holds_samples_out(name: str, spec: InputSpec, num_classes: int) -> None:
    assert recipe(name, spec, num_classes).synthesis.num_held_out >= 32


@pytest.mark.parametrize("name", ["fast", "best"])
@pytest.mark.parametrize(("spec", "num_classes"), SETTINGS)
def test_our_recipes_superpose(name: str, spec: InputSpec, num_classes: int) -> None:
    labels = recipe(name, spec, num_classes).synthesis.labels
    assert labels.superposition
    assert labels.superposition_probability > 0


def test_best_does_more_of_everything_than_fast() -> None:
    for spec, num_classes in SETTINGS:
        fast, best = recipe("fast", spec, num_classes), recipe("best", spec, num_classes)
        assert best.synthesis.num_optimized > fast.synthesis.num_optimized
        if spec is CIFAR:
            assert best.distillation.num_steps > fast.distillation.num_steps
        else:  # training students of large images makes them worse
            assert best.distillation.num_steps == fast.distillation.num_steps == 0


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_blocks_are_reconstructed_for_large_images_in_place_of_training(name: str) -> None:
    for spec, num_classes in SETTINGS:
        made = recipe(name, spec, num_classes).distillation
        wanted = spec.has_large_images and name in ("ptq", "fast", "best", "qimera")
        assert made.reconstructed_blocks == (5 if wanted else 0)
        assert not (made.reconstructed_blocks and made.num_steps)


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_every_recipe_runs(teacher: Teacher, name: str) -> None:
    """All settings of the recipe but the number of steps and samples, which are cut to a few."""
    made = recipe(name, SPEC, teacher.num_classes)
    synthesis, generator, direct = made.synthesis, made.synthesis.generator, made.synthesis.direct
    synthesis = synthesis.model_copy(
        update={
            "num_generated": min(synthesis.num_generated, 8),
            "num_optimized": min(synthesis.num_optimized, 8),
            "num_held_out": 4,
            "generator": generator.model_copy(update={"num_steps": 2, "batch_size": 8, "base_channels": 8}),
            "direct": direct.model_copy(update={"num_steps": 2, "batch_size": 8}),
        }
    )
    bank = synthesize(teacher, settings=synthesis, images=toy_pixels(4, seed=0)[0] if name == "images" else None)
    student = quantize(teacher, bank, settings=made.distillation.model_copy(update={"num_steps": 2, "batch_size": 8}))
    with torch.no_grad():
        assert bool(student(bank.take(slice(None)).images).isfinite().all())
