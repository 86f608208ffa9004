import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.mnist import MnistSplit, load_mnist_split
from qimera.assessment.evaluation import evaluate
from qimera.teacher.sources import _WEIGHTS_FOLDER, EMBEDDED_MODELS, load_model

MEASURED_TOP1 = 98.9
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


def test_the_embedded_model_reads_held_out_digits_as_measured(split: MnistSplit) -> None:
    result = evaluate(load_model("mnist_cnn"), split.held_out, EMBEDDED_MODELS["mnist_cnn"].input_spec)
    # 0.2: other kernels may turn an image or two.
    assert result.top1 >= MEASURED_TOP1 - 0.2
    assert result.top5 is not None
    assert result.top5 >= 99.8


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_weights_that_come_with_the_package_are_small_and_finite(name: str) -> None:
    path = _WEIGHTS_FOLDER / EMBEDDED_MODELS[name].weights_file
    assert path.stat().st_size < 500_000
    assert all(value.isfinite().all() for value in load_file(path).values())


def test_every_batch_norm_has_seen_training() -> None:
    norms = [module for module in load_model("mnist_cnn").modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 9
    assert all(norm.num_batches_tracked > 0 and norm.running_var.min() > 0 for norm in norms)


def test_the_description_states_the_number_of_parameters() -> None:
    model = load_model("mnist_cnn")
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,}" in EMBEDDED_MODELS["mnist_cnn"].description
