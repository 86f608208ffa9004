import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from qimera.config.input_spec import InputSpec
from qimera.config.settings import GeneratorSettings
from qimera.synthesis.generator import ClassConditionalBatchNorm, Generator, convolve_enlarged
from qimera.synthesis.superposition import soft_labels
from tests import reference


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_generator(spec: InputSpec, num_classes: int, *, conditional: bool, seed: int = 0) -> Generator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = GeneratorSettings(base_channels=8, conditional_norm_from=2 if conditional else num_classes + 1)
        return Generator(6, spec, settings, num_classes)


def inputs(batch: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return latents and soft labels of two classes each."""
    latent = torch.randn(batch, 6, generator=seeded(seed))
    label = torch.randint(num_classes, (batch, 2), generator=seeded(seed + 1))
    weight = torch.randn(batch, 2, generator=seeded(seed + 2)).softmax(1)
    return latent, soft_labels(label, weight, num_classes)


@st.composite
def input_specs(draw: st.DrawFn) -> InputSpec:
    channels = draw(st.integers(1, 4))
    low, width = draw(st.floats(-300, 100)), draw(st.floats(0.5, 300))
    mean = draw(st.lists(st.floats(low, low + width), min_size=channels, max_size=channels))
    std = draw(st.lists(st.floats(0.01, max(1.0, width)), min_size=channels, max_size=channels))
    shape = (channels, draw(st.integers(8, 40)), draw(st.integers(8, 40)))
    return InputSpec(shape=shape, mean=tuple(mean), std=tuple(std), pixel_range=(low, low + width))


def assert_valid(images: Tensor, spec: InputSpec, batch: int) -> None:
    assert images.shape == (batch, *spec.shape)
    # centre + radius * tanh rounds three times, each relative to the larger of both ends
    slack = 4e-7 * torch.maximum(spec.low.abs(), spec.high.abs())
    assert bool((images >= spec.low - slack).all())
    assert bool((images <= spec.high + slack).all())
    assert float(images.std()) > 0


# --- shapes and ranges ------------------------------------------------------------------------------------------------


@given(
    spec=input_specs(),
    num_classes=st.sampled_from([2, 3, 10, 100, 1000]),
    conditional=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_pixel_of_every_image_is_valid(
    spec: InputSpec, num_classes: int, conditional: bool, training: bool, seed: int
) -> None:
    generator = make_generator(spec, num_classes, conditional=conditional).train(training)
    latent, soft_label = inputs(2, num_classes, seed)
    with torch.no_grad():
        assert_valid(generator(latent, soft_label), spec, 2)


@pytest.mark.parametrize("shape", [(1, 8, 320), (3, 320, 8), (4, 97, 33), (2, 319, 101), (3, 224, 224), (1, 320, 320)])
def test_large_and_oblong_images_are_valid(shape: tuple[int, int, int]) -> None:
    spec = InputSpec(shape=shape, mean=(0.5,) * shape[0], std=(0.25,) * shape[0])
    generator = make_generator(spec, 10, conditional=True)
    with torch.no_grad():
        assert_valid(generator(*inputs(2, 10, 0)), spec, 2)


def test_pixels_stay_valid_where_the_last_activation_saturates() -> None:
    spec = InputSpec(shape=(3, 16, 16), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    generator = make_generator(spec, 10, conditional=False).eval()
    with torch.no_grad():
        generator.last_conv.weight.mul_(1e4)
        images = generator(*inputs(4, 10, 0))
    assert_valid(images, spec, 4)
    assert bool((images > spec.high - 1e-3).any())
    assert bool((images < spec.low + 1e-3).any())


@pytest.mark.parametrize(
    ("mean", "std", "pixel_range"),
    [
        (0.45, 0.225, (0.0, 1.0)),
        (0.13, 0.31, (0.0, 1.0)),
        (0.0, 1.0, (0.0, 1.0)),
        (0.0, 1.0, (-1.0, 1.0)),
        (0.0, 1.0, (0.0, 255.0)),
        (120.0, 60.0, (0.0, 255.0)),
        (0.0, 1.0, (-128.0, 127.0)),
    ],
)
def test_images_vary_over_much_of_the_valid_range_whatever_its_unit(
    mean: float, std: float, pixel_range: tuple[float, float]
) -> None:
    spec = InputSpec(shape=(1, 16, 16), mean=(mean,), std=(std,), pixel_range=pixel_range)
    with torch.no_grad():
        images = make_generator(spec, 10, conditional=False)(*inputs(16, 10, 0))
    shares = (images - spec.low) / (spec.high - spec.low)
    assert float(shares.std()) > 0.15
    assert 0.15 < float(shares.mean()) < 0.8


DIGITS = InputSpec(shape=(1, 28, 28), mean=(0.1307,), std=(0.3081,))
"""Most of a digit is exactly black, at -0.42, where a tanh behind images of mean 0 and variance 1 never gets."""

PHOTOGRAPHS = InputSpec(shape=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.mark.parametrize("spec", [DIGITS, PHOTOGRAPHS], ids=["digits", "photographs"])
@pytest.mark.parametrize("colour", ["low", "high"])
def test_black_and_white_are_reached_exactly_where_the_last_layer_asks_for_them(spec: InputSpec, colour: str) -> None:
    """A generator that learns to make two columns as dark, or as bright, as it can."""
    generator, drawn = make_generator(spec, 10, conditional=False), inputs(8, 10, 0)
    optimizer = torch.optim.Adam(generator.parameters(), 0.02)
    for _ in range(60):
        strip = generator(*drawn)[..., 4:6].mean()
        optimizer.zero_grad()
        (strip if colour == "low" else -strip).backward()
        optimizer.step()
    with torch.no_grad():
        made = generator(*drawn)[..., 4:6]
    assert float((made == getattr(spec, colour)).float().mean()) > 0.9


def test_every_resolution_adds_to_the_image() -> None:
    spec = InputSpec(shape=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
    generator = make_generator(spec, 10, conditional=False).eval()
    assert len(generator.to_pixels) == len(generator.sizes) - 1
    with torch.no_grad():
        before = generator(*inputs(4, 10, 0))
        for layer in generator.to_pixels:
            layer.weight.mul_(2)
            after = generator(*inputs(4, 10, 0))
            assert not torch.equal(after, before)
            before = after


def test_all_images_of_a_batch_differ() -> None:
    spec = InputSpec(shape=(1, 9, 11), mean=(0.5,), std=(0.25,))
    with torch.no_grad():
        images = make_generator(spec, 10, conditional=True)(*inputs(4, 10, 0))
    assert all(not torch.allclose(images[i], images[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("size", [(8, 12), (9, 12), (7, 11)])  # doubled, and not
def test_an_enlarged_map_is_convolved_whichever_way_is_cheaper(size: tuple[int, int]) -> None:
    conv = torch.nn.Conv2d(5, 7, 3, padding=1).double()
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64, generator=seeded(0))
    expected = conv(F.interpolate(x, size=size))
    torch.testing.assert_close(convolve_enlarged(x, size, conv), expected)


# --- cost -------------------------------------------------------------------------------------------------------------


def multiply_adds(spec: InputSpec, settings: GeneratorSettings) -> float:
    """Return those of one image, counted without computing any."""
    generator = Generator(64, spec, settings, 1000)
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        generator(torch.zeros(2, 64), torch.zeros(2, 1000))
    return counter.get_total_flops() / 2 / 2


@pytest.mark.parametrize("side", [32, 64, 224, 320])
def test_a_generator_costs_an_eighth_of_the_published_one_and_less(side: int) -> None:
    spec = InputSpec(shape=(3, side, side), mean=(0.5,) * 3, std=(0.25,) * 3)
    published = GeneratorSettings(base_channels=128, num_doublings=2)
    assert 8 * multiply_adds(spec, GeneratorSettings()) < multiply_adds(spec, published)


@pytest.mark.parametrize(("side", "first"), [(8, 4), (28, 7), (32, 4), (33, 5), (63, 8), (64, 4), (224, 7), (320, 5)])
def test_the_first_feature_map_is_a_few_pixels_wide(side: int, first: int) -> None:
    spec = InputSpec(shape=(3, side, side + 5), mean=(0.5,) * 3, std=(0.25,) * 3)
    assert Generator(6, spec, GeneratorSettings(), 10).sizes[0][0] == first


def test_two_doublings_are_the_published_generator() -> None:
    spec = InputSpec(shape=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
    made = Generator(6, spec, GeneratorSettings(base_channels=128, num_doublings=2, sum_of_scales=False), 10)
    assert made.sizes == [(8, 8), (16, 16), (32, 32)]
    shapes = [tuple(each.weight.shape) for each in made.modules() if isinstance(each, torch.nn.Conv2d)]
    assert shapes == [(128, 128, 3, 3), (64, 128, 3, 3), (3, 64, 3, 3)]


# --- class-conditional batch norm -------------------------------------------------------------------------------------


def conditional_norm(num_classes: int, channels: int, seed: int) -> ClassConditionalBatchNorm:
    norm = ClassConditionalBatchNorm(channels, num_classes)
    with torch.no_grad():
        norm.scale.copy_(torch.randn(num_classes, channels, generator=seeded(seed)))
        norm.shift.copy_(torch.randn(num_classes, channels, generator=seeded(seed + 1)))
    return norm


@given(seed=st.integers(0, 1000), num_classes=st.integers(2, 12), channels=st.integers(1, 4))
def test_scale_and_shift_are_the_label_weighted_sums_of_the_classes(seed: int, num_classes: int, channels: int) -> None:
    norm = conditional_norm(num_classes, channels, seed)
    x = torch.randn(3, channels, 4, 5, generator=seeded(seed))
    _, soft_label = inputs(3, num_classes, seed)
    expected = reference.class_conditional_batch_norm(
        x.double().numpy(),
        soft_label.double().numpy(),
        norm.scale.detach().double().numpy(),
        norm.shift.detach().double().numpy(),
        norm.norm.eps,
    )
    np.testing.assert_allclose(norm(x, soft_label).detach().numpy(), expected, atol=2e-5)  # float32 against float64


@pytest.mark.parametrize("k", [2, 10, 100, 500])
def test_mixing_many_classes_does_not_shrink_the_output(k: int) -> None:
    """At the start every class has scale 1; an average over K classes would leave 1 / K of it (deviation D3)."""
    norm = ClassConditionalBatchNorm(4, 1000)
    x = torch.randn(16, 4, 8, 8, generator=seeded(0))
    label = torch.randint(1000, (16, k), generator=seeded(1))
    soft_label = soft_labels(label, torch.randn(16, k, generator=seeded(2)).softmax(1), 1000)
    assert float(norm(x, soft_label).detach().std()) == pytest.approx(1, abs=1e-3)


def test_a_plain_label_selects_its_class() -> None:
    norm = conditional_norm(3, 2, 0)
    x = torch.randn(4, 2, 4, 4, generator=seeded(0))
    y = norm(x, torch.eye(3)[[1, 1, 1, 1]])
    torch.testing.assert_close(y.mean((0, 2, 3)), norm.shift[1])
    # rtol: the constant under the root of the batch norm
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), norm.scale[1].abs(), rtol=1e-4, atol=1e-5)


def test_with_few_classes_the_label_only_acts_through_the_latent() -> None:
    spec = InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.25,))
    generator = make_generator(spec, 10, conditional=False)
    latent, soft_label = inputs(2, 10, 0)
    with torch.no_grad():
        assert torch.equal(generator(latent, soft_label), generator(latent, soft_label.flip(1)))


def test_with_many_classes_the_label_acts_on_the_image_itself() -> None:
    spec = InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.25,))
    generator = make_generator(spec, 10, conditional=True)
    with torch.no_grad():
        generator.norms[0].scale.copy_(torch.randn(10, 8, generator=seeded(3)))
        latent, soft_label = inputs(2, 10, 0)
        assert not torch.allclose(generator(latent, soft_label), generator(latent, soft_label.roll(1, 1)))


def test_the_gradient_of_the_conditional_norm_is_that_of_finite_differences() -> None:
    norm = conditional_norm(3, 2, 0).double()
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=seeded(0), requires_grad=True)
    soft_label = torch.rand(3, 3, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    assert gradcheck(norm, (x, soft_label))


@pytest.mark.parametrize("conditional", [False, True])
def test_every_parameter_of_the_generator_gets_a_gradient(conditional: bool) -> None:
    spec = InputSpec(shape=(3, 10, 9), mean=(0.5,) * 3, std=(0.25,) * 3)
    generator = make_generator(spec, 3, conditional=conditional)
    latent, soft_label = inputs(6, 3, 0)
    (generator(latent, soft_label) * torch.randn(6, 3, 10, 9, generator=seeded(5))).sum().backward()
    # a bias that a batch norm subtracts again has no effect
    effective = {name: each for name, each in generator.named_parameters() if not name.endswith(".bias")}
    assert not [name for name, each in effective.items() if each.grad is None or not each.grad.any()]
