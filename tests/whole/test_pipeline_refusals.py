"""What the stages refuse: models, banks, recipes and bits that do not fit."""

from dataclasses import replace

import pytest
import torch

from qimera.config.input_spec import InputSpec
from qimera.config.recipes import recipe
from qimera.config.settings import DistillationSettings, GeneratorSettings
from qimera.errors import ConfigError
from qimera.pipeline import quantize, synthesize
from qimera.synthesis.bank import SampleBank
from qimera.teacher.teacher import Teacher
from tests.networks import SPEC, TinyNet

SHORT = DistillationSettings(num_steps=4, batch_size=16)


def test_a_model_without_an_input_spec_is_refused(tiny_model: TinyNet) -> None:
    with pytest.raises(ConfigError, match="input_spec: missing; pass InputSpec"):
        synthesize(tiny_model)


def test_a_teacher_takes_no_other_input_spec_than_its_own(teacher: Teacher) -> None:
    other = SPEC.replace(mean=(0.1, 0.2, 0.3))
    with pytest.raises(ConfigError, match=r"input_spec: the teacher takes images of .*; leave it out"):
        synthesize(teacher, other)


def test_a_bank_of_another_teacher_is_refused(bank: SampleBank) -> None:
    torch.manual_seed(3)
    with pytest.raises(ConfigError, match=r"bank: made for another teacher .*synthesise a bank for this model"):
        quantize(TinyNet(), bank, settings=SHORT)


def test_an_adversarial_generator_without_a_student_beside_is_refused(teacher: Teacher, bank: SampleBank) -> None:
    adversarial = bank.settings.model_copy(update={"generator": GeneratorSettings(adversarial_weight=0.1)})
    with pytest.raises(ConfigError, match=r"adversarial_weight.*generator_steps_per_step"):
        quantize(teacher, replace(bank, settings=adversarial), settings=SHORT)


def test_the_training_of_a_generator_that_the_bank_lacks_is_refused(teacher: Teacher, bank: SampleBank) -> None:
    settings = SHORT.model_copy(update={"generator_steps_per_step": 1})
    with pytest.raises(ConfigError, match="generator_steps_per_step: 1, but the bank has no generator to train"):
        quantize(teacher, replace(bank, synthesizer=None), settings=settings)


def test_a_bank_for_other_images_is_refused(tiny_model: TinyNet, bank: SampleBank) -> None:
    other = Teacher.capture(tiny_model, InputSpec(shape=SPEC.shape, mean=(0.0,) * 3, std=(1.0,) * 3))
    with pytest.raises(ConfigError, match=r"bank: made for images of .*this teacher takes"):
        quantize(other, bank, settings=SHORT)


def test_a_recipe_by_its_name_is_its_settings(teacher: Teacher, bank: SampleBank) -> None:
    named = quantize(teacher, bank, recipe="ptq")
    spelt = quantize(teacher, bank, settings=recipe("ptq", SPEC, teacher.num_classes).distillation)
    images = bank.take(slice(None)).images
    assert torch.equal(named(images), spelt(images))
    with pytest.raises(ConfigError, match="no recipe called 'quick'"):
        quantize(teacher, bank, recipe="quick")
    with pytest.raises(ConfigError, match="no recipe called 'quick'"):
        synthesize(teacher, recipe="quick")
    with pytest.raises(ConfigError, match="recipe: ptq has settings of its own; leave out recipe or settings"):
        quantize(teacher, bank, recipe="ptq", settings=SHORT)
    with pytest.raises(ConfigError, match="recipe: ptq has settings of its own; leave out recipe or settings"):
        synthesize(teacher, recipe="ptq", settings=bank.settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": "w1a4"}, "weight bits must be 2 to 8"),
        ({"bits": "four"}, "expected the form w4a4"),
        ({"scheme": "mixed"}, "scheme: .*'hardware' or 'paper'"),
        ({"layer_bits": "fc"}, "layer_bits: expected PATTERN=BITS"),
        ({"layer_bits": "fc=9"}, "layer_bits: fc: weight bits must be 2 to 8, given 9"),
    ],
)
def test_wrong_arguments_are_refused(
    teacher: Teacher, bank: SampleBank, arguments: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(teacher, bank, settings=SHORT, **arguments)


def test_a_start_that_the_scheme_of_the_paper_has_not_is_refused(teacher: Teacher, bank: SampleBank) -> None:
    settings = DistillationSettings(num_steps=0, start="compensated")
    with pytest.raises(ConfigError, match="start: compensated integers are for scheme hardware, given scheme paper"):
        quantize(teacher, bank, scheme="paper", settings=settings)


def test_bits_for_a_layer_that_is_not_there_are_refused_with_the_nearest_name(
    teacher: Teacher, bank: SampleBank
) -> None:
    with pytest.raises(ConfigError, match=r"layer_bits: 'cnov1' fits none of the 6 layers \(nearest: conv1, "):
        quantize(teacher, bank, layer_bits="cnov1=8", settings=SHORT)
