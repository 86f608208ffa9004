"""Two classifiers of CIFAR-10 without batch norms, larger siblings of those that come with the package.

``python -m scripts.train_cifar_teacher NAME`` made the weights beside this file, which are stored in 16 bits.
"""

from pathlib import Path

from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from qimera import InputSpec
from qimera.teacher.mnist_networks import ChannelNorm, ConvNextBlock, VisionTransformer


class CifarVit(VisionTransformer):
    """A plain vision transformer of six blocks with 459,658 parameters.

    A class token and 64 patches of 4x4 pixels have 96 channels and learned position embeddings.
    """

    def __init__(self) -> None:
        """Make the network with random weights."""
        super().__init__(in_channels=3, num_patches=64, dim=96, hidden_dim=192, num_blocks=6)


class CifarConvNext(nn.Module):
    """A ConvNeXt of six blocks with 36, 72 and 144 channels and 519,238 parameters."""

    def __init__(self) -> None:
        """Make the network with random weights."""
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 36, kernel_size=2, stride=2), ChannelNorm(36))
        self.stage1 = nn.Sequential(ConvNextBlock(36), ConvNextBlock(36))
        self.stage2 = nn.Sequential(_halved(36, 72), ConvNextBlock(72), ConvNextBlock(72))
        self.stage3 = nn.Sequential(_halved(72, 144), ConvNextBlock(144), ConvNextBlock(144))
        self.norm = nn.LayerNorm(144)
        self.head = nn.Linear(144, 10)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 10"]:
        """Return the logits of the ten classes."""
        features = self.stage3(self.stage2(self.stage1(self.stem(images))))
        logits: Tensor = self.head(self.norm(features.mean(dim=(2, 3))))
        return logits


def _halved(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(ChannelNorm(in_channels), nn.Conv2d(in_channels, out_channels, kernel_size=2, stride=2))


BUILDERS: dict[str, type[nn.Module]] = {"convnext_cifar10": CifarConvNext, "vit_cifar10": CifarVit}
INPUT_SPEC = InputSpec(shape=(3, 32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


def weights_of(name: str) -> Path:
    """Return the file that holds the weights of the network called ``name``."""
    return Path(__file__).parent / f"{name}.safetensors"


def load_network(name: str) -> nn.Module:
    """Return the trained network called ``name``."""
    network = BUILDERS[name]()
    network.load_state_dict(load_file(weights_of(name)))
    return network.eval()
