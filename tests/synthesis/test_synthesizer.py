import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.config.settings import GeneratorSettings, LabelSettings, QuantizationSettings, SynthesisSettings
from qimera.errors import DivergenceError
from qimera.machine.divergence import check_finite
from qimera.machine.seeds import Stream, generator_for
from qimera.student.student import Student
from qimera.synthesis.augmentation import shift_batch
from qimera.synthesis.losses import bns_loss
from qimera.synthesis.synthesizer import Draw, Synthesizer, SynthesizerTraining
from qimera.teacher.teacher import Teacher
from tests import reference
from tests.networks import NUM_CLASSES, SPEC, toy_pixels


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings_of(labels: LabelSettings | None = None, **generator: object) -> SynthesisSettings:
    small = {"batch_size": 16, "base_channels": 16, "mapping_dim": 8, "embedding_dim": 9, "precision": "float32"}
    return SynthesisSettings(
        labels=labels or LabelSettings(superposition_probability=1.0, num_superposed_classes=3),
        generator=GeneratorSettings(**{**small, **generator}),
    )


def synthesizer_of(teacher: Teacher, seed: int = 0, **generator: object) -> Synthesizer:
    return Synthesizer(teacher, settings_of(**generator), seeded(seed))


def latent_seen_by_generator(synthesizer: Synthesizer, drawn: Draw) -> Tensor:
    """Return what enters the generator network."""
    seen: list[Tensor] = []
    handle = synthesizer.generator.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        synthesizer(drawn)
    handle.remove()
    return seen[0]


# --- from draw to generator input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("extracted", [True, False])
@pytest.mark.parametrize("mapping", [True, False])
def test_the_generator_gets_the_superposition_of_mapped_normalised_embeddings(
    teacher: Teacher, extracted: bool, mapping: bool
) -> None:
    synthesizer = synthesizer_of(teacher, extracted_embeddings=extracted, disentanglement_mapping=mapping)
    drawn = synthesizer.draw(6, seeded(1))
    if extracted:
        table = teacher.classifier.weight
    else:
        table = synthesizer.embedding.weight.detach()
        assert table.shape == (NUM_CLASSES, 9)
        assert not torch.allclose(table[:, :4], teacher.classifier.weight[:, :4])
    matrix = None
    if mapping:
        assert isinstance(synthesizer.mapping, nn.Linear)
        matrix = synthesizer.mapping.weight.detach().double().numpy()
        assert matrix.shape == (8, table.shape[1])
    latent = latent_seen_by_generator(synthesizer, drawn)
    for sample in range(6):
        expected = reference.mixed_latent(
            table.double().numpy(),
            float(table.std()),
            matrix,
            drawn.label[sample].numpy(),
            drawn.weight[sample].double().numpy(),
            drawn.noise[sample].double().numpy(),
        )
        np.testing.assert_allclose(latent[sample].numpy(), expected, atol=1e-5)  # float32 against float64


def test_the_mapping_decides_the_width_of_the_generator(teacher: Teacher) -> None:
    assert synthesizer_of(teacher).generator.linear.in_features == 8
    assert synthesizer_of(teacher, disentanglement_mapping=False).generator.linear.in_features == 24
    plain = synthesizer_of(teacher, disentanglement_mapping=False, extracted_embeddings=False)
    assert plain.generator.linear.in_features == 9


def test_a_superposed_image_is_none_of_the_images_of_its_classes(teacher: Teacher) -> None:
    synthesizer = synthesizer_of(teacher).eval()
    noise = torch.randn(1, 2, 24, generator=seeded(0)).expand(3, 2, 24)
    label = torch.tensor([[0, 1]]).expand(3, 2)
    weight = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    with torch.no_grad():
        images, soft_label = synthesizer(Draw(label, weight, noise))
    torch.testing.assert_close(soft_label[:, :2], weight)
    spread = (images[0] - images[2]).abs().mean()
    assert float(spread) > 0
    assert float((images[1] - images[0]).abs().mean()) > 0.1 * float(spread)
    assert float((images[1] - images[2]).abs().mean()) > 0.1 * float(spread)


def test_an_image_depends_on_every_share(teacher: Teacher) -> None:
    synthesizer = synthesizer_of(teacher).eval()
    drawn = synthesizer.draw(1, seeded(0))
    shares = drawn.weight.clone().requires_grad_()
    images, _ = synthesizer(Draw(drawn.label, shares, drawn.noise))
    (gradient,) = torch.autograd.grad(images.square().sum(), shares)
    assert bool((gradient != 0).all())


def test_images_carry_the_soft_labels_of_their_draw(teacher: Teacher) -> None:
    synthesizer = synthesizer_of(teacher)
    drawn = synthesizer.draw(6, seeded(1))
    _, soft_label = synthesizer(drawn)
    expected = [
        reference.soft_label(a, b, NUM_CLASSES)
        for a, b in zip(drawn.label.numpy(), drawn.weight.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(soft_label.numpy(), expected, atol=1e-6)  # float32 against float64


def test_without_superposition_a_draw_has_one_class_per_sample(teacher: Teacher) -> None:
    settings = settings_of(LabelSettings(superposition=False))
    drawn = Synthesizer(teacher, settings, seeded(0)).draw(10, seeded(1))
    assert drawn.label.shape == (10, 1)
    assert torch.equal(drawn.weight, torch.ones(10, 1))


@pytest.mark.parametrize(("threshold", "conditional"), [(NUM_CLASSES, True), (NUM_CLASSES + 1, False)])
def test_batch_norms_are_conditioned_from_so_many_classes_on(
    teacher: Teacher, threshold: int, conditional: bool
) -> None:
    names = [name for name, _ in synthesizer_of(teacher, conditional_norm_from=threshold).named_parameters()]
    assert ("generator.norms.0.scale" in names) is conditional


def test_the_teachers_classifier_is_copied_not_shared(teacher: Teacher) -> None:
    before = teacher.classifier.weight.clone()
    synthesizer = synthesizer_of(teacher)
    training = SynthesizerTraining(synthesizer, teacher, settings_of(), 1)
    for _ in range(3):
        training.step()
    assert not torch.equal(synthesizer.embedding.weight, before)
    assert torch.equal(teacher.classifier.weight, before)


def test_same_seed_same_synthesizer_whatever_the_global_generator_holds(teacher: Teacher) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = synthesizer_of(teacher).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two, other = synthesizer_of(teacher).state_dict(), synthesizer_of(teacher, seed=1).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["generator.convs.0.weight"], other["generator.convs.0.weight"])


def test_a_new_synthesizer_leaves_the_random_generators_of_gpus_alone(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded them"))
    before = torch.get_rng_state()
    synthesizer_of(teacher)
    assert torch.equal(torch.get_rng_state(), before)


# --- training ---------------------------------------------------------------------------------------------------------


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    dims = [0, *range(2, x.ndim)]
    mean = x.mean(dims, keepdim=True)
    return mean.flatten(), (x - mean).square().mean(dims)


@pytest.mark.parametrize(("ce_weight", "bns_weight"), [(1.0, 0.1), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("tv_weight", "max_shift"), [(0.0, 0), (0.5, 0), (0.5, 2)])
def test_a_step_follows_the_gradient_of_cross_entropy_bns_and_smoothness(
    teacher: Teacher, ce_weight: float, bns_weight: float, relative: bool, tv_weight: float, max_shift: int
) -> None:
    """The loss is written out again here, on a copy of the generator with the same draw."""
    settings = settings_of(
        ce_weight=ce_weight, bns_weight=bns_weight, relative_bns=relative, tv_weight=tv_weight, max_shift=max_shift
    )
    synthesizer = Synthesizer(teacher, settings, seeded(0))
    twin = copy.deepcopy(synthesizer)
    SynthesizerTraining(synthesizer, teacher, settings, 1).step()

    random = generator_for(1, Stream.TRAINING_ALONE, 0, 0)
    images, soft_label = twin(twin.draw(16, random))
    images = shift_batch(images, max_shift, random)
    logits, (entering, *_) = teacher.forward_with_taps(images)
    loss = -ce_weight * (soft_label * logits.log_softmax(1)).sum(1).mean()
    for x, recorded in zip(entering, teacher.batch_norms, strict=True):
        mean, var = statistics(x)
        gap = (mean - recorded.mean).square() + (var - recorded.var).square()
        if relative:
            gap = (mean - recorded.mean).square() + (var.sqrt() - recorded.var.sqrt()).square()
            gap = gap / (var + recorded.var)
        loss = loss + bns_weight * gap.mean() / len(entering)
    neighbours = [(images[:, :, 1:], images[:, :, :-1]), (images[..., 1:], images[..., :-1])]
    loss = loss + tv_weight * sum((one - two).abs().mean() for one, two in neighbours)
    loss.backward()
    for (name, mine), theirs in zip(synthesizer.named_parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        # another order of operations, memory layout included; biases before a batch norm get rounding errors alone
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3 * scale + 1e-6, msg=name)


def test_an_adversarial_generator_seeks_samples_that_the_student_gets_wrong(teacher: Teacher) -> None:
    student = Student(teacher, QuantizationSettings(weight_bits=2, activation_bits=2))
    student.initialize_ranges_([SPEC.normalize(toy_pixels(64, seed=3)[0])])
    gaps = {}
    for weight in (0.0, 5.0):
        settings = settings_of(adversarial_weight=weight, learning_rate=0.01)
        synthesizer = Synthesizer(teacher, settings, seeded(0))
        training = SynthesizerTraining(synthesizer, teacher, settings, 1, student)
        for _ in range(15):
            losses = training.step()
        assert ("generator_gap" in losses) is (weight > 0)
        with torch.no_grad():
            images, _ = synthesizer.eval()(synthesizer.draw(64, seeded(2)))
            gaps[weight] = float((student.module(images) - teacher(images)).abs().mean())
    assert gaps[5.0] > 1.2 * gaps[0.0]
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_step_is_one_of_adam_with_the_published_momenta(teacher: Teacher) -> None:
    settings = settings_of(learning_rate=0.01, milestones=(2,))
    training = SynthesizerTraining(Synthesizer(teacher, settings, seeded(0)), teacher, settings, 1)
    (group,) = training.optimizer.param_groups
    assert isinstance(training.optimizer, torch.optim.Adam)
    assert group["betas"] == (0.5, 0.999)
    rates = []
    for _ in range(3):
        rates.append(group["lr"])
        training.step()
    assert rates == pytest.approx([0.01, 0.01, 0.001])


@pytest.mark.parametrize("part", ["embedding.weight", "mapping.weight", "generator.linear.weight"])
def test_training_moves_embeddings_mapping_and_generator(teacher: Teacher, part: str) -> None:
    synthesizer = synthesizer_of(teacher)
    before = dict(synthesizer.named_parameters())[part].detach().clone()
    SynthesizerTraining(synthesizer, teacher, settings_of(), 1).step()
    assert not torch.equal(dict(synthesizer.named_parameters())[part], before)


def measured(synthesizer: Synthesizer, teacher: Teacher) -> tuple[float, float]:
    """Return cross-entropy and BNS loss of 200 samples."""
    synthesizer.train()
    with torch.no_grad():
        images, soft_label = synthesizer(synthesizer.draw(200, seeded(9)))
        logits, (entering, *_) = teacher.forward_with_taps(images)
        ce = F.cross_entropy(logits, soft_label)
        return float(ce), float(bns_loss(entering, teacher.batch_norms))


def test_training_makes_the_teacher_recognise_the_samples_and_its_statistics(teacher: Teacher) -> None:
    settings = settings_of(ce_weight=1.0, bns_weight=1.0, relative_bns=False)
    synthesizer = Synthesizer(teacher, settings, seeded(0))
    before = measured(synthesizer, teacher)
    training = SynthesizerTraining(synthesizer, teacher, settings, 1)
    for _ in range(60):
        training.step()
    after = measured(synthesizer, teacher)
    assert after[0] < 0.8 * before[0]
    assert after[1] < 0.5 * before[1]


def test_at_bfloat16_images_and_losses_are_nearly_the_same_and_images_float32(teacher: Teacher) -> None:
    found = {}
    for precision in ("float32", "bfloat16"):
        generator = GeneratorSettings(batch_size=32, num_steps=1, compile="never", precision=precision)
        settings = SynthesisSettings(generator=generator)
        synthesizer = Synthesizer(teacher, settings, generator_for(0, Stream.GENERATOR))
        images = synthesizer(synthesizer.draw(32, seeded(0)))[0].detach()
        found[precision] = images, SynthesizerTraining(synthesizer, teacher, settings, 0).step()
    (exact, losses), (narrow, narrow_losses) = found.values()
    assert narrow.dtype == torch.float32
    assert 0 < float((narrow - exact).norm() / exact.norm()) < 0.03  # eight bits of mantissa, twice in sequence
    assert {name: float(value) for name, value in narrow_losses.items()} == pytest.approx(
        {name: float(value) for name, value in losses.items()}, rel=0.05
    )


def test_no_gradient_reaches_the_teacher(teacher: Teacher) -> None:
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    training = SynthesizerTraining(synthesizer_of(teacher), teacher, settings_of(), 1)
    training.step()
    assert all(not each.requires_grad and each.grad is None for each in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_same_seed_same_training(teacher: Teacher) -> None:
    def trained(seed: int) -> dict[str, Tensor]:
        synthesizer = synthesizer_of(teacher)
        training = SynthesizerTraining(synthesizer, teacher, settings_of(), seed)
        for _ in range(3):
            training.step()
        return synthesizer.state_dict()

    one, two, other = trained(1), trained(1), trained(2)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["generator.convs.0.weight"], other["generator.convs.0.weight"])


def test_a_diverging_generator_stops_with_the_name_of_the_term(teacher: Teacher) -> None:
    settings = settings_of()
    synthesizer = Synthesizer(teacher, settings, seeded(0))
    with torch.no_grad():
        synthesizer.generator.linear.weight.fill_(float("nan"))
    with pytest.raises(DivergenceError, match="generator_ce became nan at step 1; lower the learning rate"):
        SynthesizerTraining(synthesizer, teacher, settings, 1).step()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_message_names_the_first_term_that_is_not_finite(value: float) -> None:
    losses = {"one": torch.tensor(1.0), "two": torch.tensor(value)}
    with pytest.raises(DivergenceError, match=f"two became {value} at step 7"):
        check_finite(losses, 7, 10)


def test_finite_losses_pass() -> None:
    losses = {"one": torch.tensor(1.0), "two": torch.tensor(2.0)}
    assert check_finite(losses, 1, 10) is losses


def test_the_images_of_the_synthesizer_are_valid(teacher: Teacher) -> None:
    with torch.no_grad():
        images, _ = synthesizer_of(teacher)(synthesizer_of(teacher).draw(16, seeded(0)))
    assert bool((images >= SPEC.low - 1e-5).all())  # rounding of centre + radius * tanh
    assert bool((images <= SPEC.high + 1e-5).all())
