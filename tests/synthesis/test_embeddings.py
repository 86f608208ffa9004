import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from qimera.config.settings import GeneratorSettings
from qimera.synthesis.embeddings import ClassEmbedding, DisentanglementMapping
from tests import reference


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classifier_weight(num_classes: int = 5, latent: int = 12) -> Tensor:
    return 3 + 0.5 * torch.randn(num_classes, latent, generator=seeded(1))


def embedding(weight: Tensor | None = None, seed: int = 0, **settings: object) -> ClassEmbedding:
    return ClassEmbedding(
        classifier_weight() if weight is None else weight, GeneratorSettings(**settings), seeded(seed)
    )


def test_extracted_embeddings_are_the_rows_of_the_classifier_weight() -> None:
    weight = classifier_weight()
    assert torch.equal(embedding(weight).weight, weight)


def test_extracted_embeddings_are_trained_without_touching_the_classifier() -> None:
    weight = classifier_weight()
    made = embedding(weight)
    assert made.weight.requires_grad
    with torch.no_grad():
        made.weight.zero_()
    assert torch.equal(weight, classifier_weight())


def test_random_embeddings_owe_nothing_to_the_classifier() -> None:
    one = embedding(classifier_weight(), extracted_embeddings=False, embedding_dim=7)
    two = embedding(100 * classifier_weight(), extracted_embeddings=False, embedding_dim=7)
    assert one.weight.shape == (5, 7)
    assert one.latent_dim == 7
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, embedding(seed=1, extracted_embeddings=False, embedding_dim=7).weight)


@given(seed=st.integers(0, 1000), batch=st.integers(1, 4), k=st.integers(1, 4), noise_scale=st.floats(0, 3))
def test_a_latent_is_the_normalised_sum_of_embedding_and_noise(
    seed: int, batch: int, k: int, noise_scale: float
) -> None:
    made = embedding(noise_scale=noise_scale)
    label = torch.randint(5, (batch, k), generator=seeded(seed))
    noise = torch.randn(batch, k, 12, generator=seeded(seed + 1))
    latent = made(label, noise)
    rows = classifier_weight().double().numpy()
    spread = float(classifier_weight().std())
    for i, j in np.ndindex(batch, k):
        expected = reference.normalize(rows[label[i, j]] + noise_scale * spread * noise[i, j].double().numpy())
        # float32 against float64; the mean of 3 cancels digits
        np.testing.assert_allclose(latent[i, j].detach().numpy(), expected, atol=2e-5)


@given(seed=st.integers(0, 1000))
def test_every_latent_has_mean_zero_and_variance_one(seed: int) -> None:
    latent = embedding()(torch.tensor([[0, 3]]), torch.randn(1, 2, 12, generator=seeded(seed)))
    # atol: the constant under the root, against a variance of at least 0.02
    torch.testing.assert_close(latent.mean(2), torch.zeros(1, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(latent.var(2, correction=0), torch.ones(1, 2), atol=1e-3, rtol=0)


def test_noise_makes_samples_of_one_class_differ_and_without_it_they_are_equal() -> None:
    label, noise = torch.zeros(2, 1, dtype=torch.int64), torch.randn(2, 1, 12, generator=seeded(0))
    noisy, plain = embedding(noise_scale=1.0)(label, noise), embedding(noise_scale=0.0)(label, noise)
    assert not torch.allclose(noisy[0], noisy[1])
    assert torch.equal(plain[0], plain[1])


def test_the_gradient_of_a_latent_is_that_of_finite_differences() -> None:
    made = embedding(noise_scale=0.5).double()
    label, noise = torch.tensor([[0, 3]]), torch.randn(1, 2, 12, generator=seeded(0), dtype=torch.float64)
    weight = made.weight.detach().requires_grad_()
    assert gradcheck(
        lambda entering: torch.func.functional_call(made, {"weight": entering}, (label, noise)),
        (weight,),
    )


@pytest.mark.parametrize(("latent", "mapped"), [(12, 5), (5, 12)])
def test_the_disentanglement_mapping_is_a_matrix_product(latent: int, mapped: int) -> None:
    mapping = DisentanglementMapping(latent, mapped)
    assert mapping.bias is None
    x = torch.randn(2, 3, latent, generator=seeded(0))
    matrix = mapping.weight.detach().double().numpy()
    y = mapping(x)
    for i, j in np.ndindex(2, 3):
        expected = reference.matrix_times(matrix, x[i, j].double().numpy())
        np.testing.assert_allclose(y[i, j].detach().numpy(), expected, atol=1e-5)  # float32 against float64
