import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.mnist import MnistSplit, load_mnist_split
from qimera.assessment.evaluation import evaluate
from qimera.teacher.mnist_networks import ChannelNorm
from qimera.teacher.sources import _WEIGHTS_FOLDER, EMBEDDED_MODELS, load_model
from qimera.teacher.teacher import Teacher

MEASURED_TOP1 = {"mnist_cnn": 98.9, "mnist_vit": 98.8, "mnist_convnext": 98.4}
"""Of the 1,000 held-out images, as scripts/train_embedded_model.py printed it."""


@pytest.fixture(scope="module")
def split() -> MnistSplit:
    return load_mnist_split()


def test_the_split_holds_out_100_images_of_each_digit(split: MnistSplit) -> None:
    assert torch.tensor(split.train.labels).bincount().tolist() == [400] * 10
    assert torch.tensor(split.held_out.labels).bincount().tolist() == [100] * 10


def test_no_held_out_image_is_a_training_image(split: MnistSplit) -> None:
    trained = {image.tobytes() for image in split.train.images[:]}
    assert not any(image.tobytes() in trained for image in split.held_out.images[:])


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_the_embedded_models_read_held_out_digits_as_measured(split: MnistSplit, name: str) -> None:
    result = evaluate(load_model(name), split.held_out, EMBEDDED_MODELS[name].input_spec)
    # 0.2: other kernels may turn an image or two.
    assert result.top1 == pytest.approx(MEASURED_TOP1[name], abs=0.2)
    assert result.top5 is not None
    assert result.top5 >= 99.8


MOST_BYTES = {"mnist_cnn": 320_000, "mnist_vit": 300_000, "mnist_convnext": 150_000}


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_weights_that_come_with_the_package_are_small_and_finite(name: str) -> None:
    path = _WEIGHTS_FOLDER / EMBEDDED_MODELS[name].weights_file
    assert path.stat().st_size < MOST_BYTES[name]
    assert all(value.isfinite().all() for value in load_file(path).values())


def test_no_weights_file_is_left_over() -> None:
    present = {path.name for path in _WEIGHTS_FOLDER.iterdir()}
    assert present == {embedded.weights_file for embedded in EMBEDDED_MODELS.values()}


def test_every_batch_norm_has_seen_training() -> None:
    norms = [module for module in load_model("mnist_cnn").modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 9
    assert all(norm.num_batches_tracked > 0 and norm.running_var.min() > 0 for norm in norms)


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_the_descriptions_state_the_number_of_parameters(name: str) -> None:
    number = f"{sum(parameter.numel() for parameter in load_model(name).parameters()):,} parameters"
    assert number in EMBEDDED_MODELS[name].description
    assert number in (EMBEDDED_MODELS[name].build.__doc__ or "")


@pytest.mark.parametrize(("name", "num_layers"), [("mnist_vit", 14), ("mnist_convnext", 15)])
def test_networks_without_batch_norms_are_captured_as_they_are(split: MnistSplit, name: str, num_layers: int) -> None:
    model, spec = load_model(name), EMBEDDED_MODELS[name].input_spec
    teacher = Teacher.capture(model, spec)
    assert len(teacher.batch_norms) == 0
    assert len(teacher.layers) == num_layers
    assert teacher.classifier.name == "head"
    images = spec.normalize(torch.from_numpy(split.held_out.images[:7]).permute(0, 3, 1, 2))
    with torch.inference_mode():
        # The graph may sum in another order.
        torch.testing.assert_close(teacher(images), model(images), rtol=1e-4, atol=1e-4)


def test_the_transformer_attends_with_four_heads_to_its_class_token_and_49_patches() -> None:
    seen: list[tuple[int, ...]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append(tuple(query.shape))
        return softmax_attention(query, key, value)

    model, images = load_model("mnist_vit"), torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    expected = model(images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        torch.testing.assert_close(model(images), expected)
    assert seen == [(2, 4, 50, 12)] * 3


def softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention written out."""
    return (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1) @ value


def test_channel_norm_standardises_each_pixel_over_its_channels() -> None:
    features = torch.randn(2, 16, 3, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    centred = features - features.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(ChannelNorm(16)(features), expected)
