"""The classifiers without batch norms that benchmarks measure on, beside those of the zoo."""

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.teachers.networks import BUILDERS, load_network, weights_of
from benchmarks.zoo import FOLDER, load_subject
from qimera.assessment.evaluation import evaluate

MEASURED_TOP1 = {"convnext_cifar10": 85.04, "vit_cifar10": 81.29}
"""Of the 10,000 test images, as scripts/train_cifar_teacher.py printed it."""


@pytest.mark.parametrize("name", BUILDERS)
def test_their_weights_are_small_and_finite_and_fit_the_network(name: str) -> None:
    values = load_file(weights_of(name))
    assert weights_of(name).stat().st_size < 2_000_000
    assert all(value.isfinite().all() for value in values.values())
    with torch.no_grad():
        logits = load_network(name)(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 10)
    assert not logits[0].allclose(logits[1])


@pytest.mark.slow
@pytest.mark.skipif(not (FOLDER / "zoo.py").is_file(), reason="QIMERA_ZOO names no folder with a zoo.py")
@pytest.mark.parametrize("name", BUILDERS)
def test_they_read_test_images_as_measured(name: str) -> None:
    teacher, images = load_subject(name)
    # 0.1: other kernels may turn a few images.
    assert evaluate(teacher, images, teacher.input_spec).top1 == pytest.approx(MEASURED_TOP1[name], abs=0.1)
