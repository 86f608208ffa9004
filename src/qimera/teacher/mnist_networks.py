"""The architectures of the models that come with the package; their weights lie in ``qimera/teacher/weights``."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norms beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        """Make a block that divides height and width by ``stride``."""
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels, stride=1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(
        self, features: Float[Tensor, "batch in_channel height width"]
    ) -> Float[Tensor, "batch out_channel out_height out_width"]:
        """Return the rectified sum of the convolved and the passed features."""
        residual = F.relu(self.bn1(self.conv1(features)))
        residual = self.bn2(self.conv2(residual))
        return F.relu(residual + self.shortcut(features))


class MnistCnn(nn.Module):
    """A residual network with 16, 32 and 64 channels and 77,754 parameters for 28x28 images of handwritten digits."""

    def __init__(self) -> None:
        """Make the network with random weights."""
        super().__init__()
        self.conv = _conv3x3(1, 16, stride=1)
        self.bn = nn.BatchNorm2d(16)
        self.stage1 = ResidualBlock(16, 16, stride=1)
        self.stage2 = ResidualBlock(16, 32, stride=2)
        self.stage3 = ResidualBlock(32, 64, stride=2)
        self.fc = nn.Linear(64, 10)

    def forward(self, images: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 10"]:
        """Return the logits of the ten digits."""
        features = F.relu(self.bn(self.conv(images)))
        features = self.stage3(self.stage2(self.stage1(features)))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(features, 1).flatten(1))
        return logits


class MultiHeadAttention(nn.Module):
    """Attention of all tokens to all tokens, in several heads."""

    def __init__(self, dim: int, num_heads: int) -> None:
        """Make heads of ``dim / num_heads`` channels each."""
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Float[Tensor, "batch token channel"]) -> Float[Tensor, "batch token channel"]:
        """Return the attended values of all heads, projected."""
        batch, num_tokens, dim = tokens.shape
        heads = self.qkv(tokens).view(batch, num_tokens, 3, self.num_heads, dim // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # (batch, head, token, channel of a head) each
        attended = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.proj(attended.transpose(1, 2).reshape(batch, num_tokens, dim))
        return projected


class TransformerBlock(nn.Module):
    """Attention and two linear layers, each behind a layer norm and beside a shortcut."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int) -> None:
        """Make a block whose first linear layer returns ``hidden_dim`` channels."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = MultiHeadAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Float[Tensor, "batch token channel"]) -> Float[Tensor, "batch token channel"]:
        """Return the tokens after both residual branches."""
        tokens = tokens + self.attn(self.norm1(tokens))
        residual: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(tokens))))
        return tokens + residual


class VisionTransformer(nn.Module):
    """A plain vision transformer of square patches and a class token, whose position embeddings are learned."""

    def __init__(self, in_channels: int, num_patches: int, dim: int, hidden_dim: int, num_blocks: int) -> None:
        """Make patches of 4x4 pixels, blocks of four heads and ten classes, with random weights."""
        super().__init__()
        self.patch_embed = nn.Conv2d(in_channels, dim, kernel_size=4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + num_patches, dim) * 0.02)
        self.blocks = nn.Sequential(
            *(TransformerBlock(dim, num_heads=4, hidden_dim=hidden_dim) for _ in range(num_blocks))
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, images: Float[Tensor, "batch in_channel height width"]) -> Float[Tensor, "batch 10"]:
        """Return the logits of the ten classes."""
        return self.classify(self.embed(images))

    def embed(self, images: Float[Tensor, "batch in_channel height width"]) -> Float[Tensor, "batch token channel"]:
        """Return the class token and the patches, with their position embeddings."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (batch, token, channel)
        return torch.cat([self.cls_token.expand(images.shape[0], -1, -1), patches], dim=1) + self.pos_embed

    def classify(self, tokens: Float[Tensor, "batch token channel"]) -> Float[Tensor, "batch 10"]:
        """Return the logits of the ten classes, from the class token and any number of patches."""
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


class MnistVit(VisionTransformer):
    """A vision transformer of three blocks with 70,042 parameters for 28x28 images of handwritten digits.

    Its 49 patches of 4x4 pixels and a class token have 48 channels and position embeddings that are learned.
    """

    def __init__(self) -> None:
        """Make the network with random weights."""
        super().__init__(in_channels=1, num_patches=49, dim=48, hidden_dim=128, num_blocks=3)


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of each pixel."""

    def forward(
        self, features: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """Return the features with mean 0 and variance 1 in every pixel, scaled and shifted."""
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """A depthwise 7x7 convolution, a layer norm and two linear layers, scaled and beside a shortcut."""

    def __init__(self, channels: int) -> None:
        """Make a block whose linear layers go through four times as many channels."""
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)
        self.layer_scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(
        self, features: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """Return the sum of the features and the residual branch."""
        residual = self.norm(self.depthwise(features).permute(0, 2, 3, 1))  # (batch, height, width, channel)
        scaled: Tensor = self.layer_scale * self.fc2(F.gelu(self.fc1(residual)))
        return features + scaled.permute(0, 3, 1, 2)


class MnistConvNext(nn.Module):
    """A ConvNeXt of four blocks with 28,666 parameters for 28x28 images of handwritten digits."""

    def __init__(self) -> None:
        """Make the network with random weights."""
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, kernel_size=2, stride=2), ChannelNorm(16))
        self.stage1 = nn.Sequential(ConvNextBlock(16), ConvNextBlock(16))
        self.downsample = nn.Sequential(ChannelNorm(16), nn.Conv2d(16, 32, kernel_size=2, stride=2))
        self.stage2 = nn.Sequential(ConvNextBlock(32), ConvNextBlock(32))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 10"]:
        """Return the logits of the ten digits."""
        features = self.stage2(self.downsample(self.stage1(self.stem(images))))
        logits: Tensor = self.head(self.norm(features.mean(dim=(2, 3))))
        return logits


def _conv3x3(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))
