"""Classes -> latents: extracted class embeddings, their noise and normalisation, and the disentanglement mapping."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.config.settings import GeneratorSettings


class ClassEmbedding(nn.Module):
    """One trainable vector per class, started from the classifier's weight.

    Choi et al. 2021, extracted embedding initialization (EEI); off in most released scripts (deviation D2).
    """

    def __init__(
        self,
        classifier_weight: Float[Tensor, "num_classes latent"],
        settings: GeneratorSettings,
        rng: torch.Generator,
    ) -> None:
        super().__init__()
        if settings.extracted_embeddings:
            start = classifier_weight.detach().clone()
        else:
            start = torch.randn(classifier_weight.shape[0], settings.embedding_dim, generator=rng)
        self.weight = nn.Parameter(start)
        self.noise_scale = settings.noise_scale * float(start.std())

    @property
    def latent_dim(self) -> int:
        """Width of one latent."""
        return self.weight.shape[1]

    def forward(
        self, label: Int[Tensor, "batch k"], noise: Float[Tensor, "batch k latent"]
    ) -> Float[Tensor, "batch k latent"]:
        """Return ``normalise(embedding + noise)``, each latent with mean 0 and variance 1 over its own entries.

        The authors' code normalises superposed latents over the whole batch instead (deviation D19).
        """
        return F.layer_norm(self.weight[label] + self.noise_scale * noise, (self.latent_dim,))


class DisentanglementMapping(nn.Linear):
    """Learned linear map of every class latent into the space where latents are superposed.

    Choi et al. 2021, disentanglement mapping (DM); the released scripts switch it off (deviation D1).
    """

    def __init__(self, latent_dim: int, mapping_dim: int) -> None:
        super().__init__(latent_dim, mapping_dim, bias=False)
