"""Small classifiers, one for each thing that a graph can do, and a task that the first of them learns in a second."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qimera.config.input_spec import InputSpec

NUM_CLASSES = 5
SPEC = InputSpec(shape=(3, 16, 16), mean=(0.48, 0.45, 0.5), std=(0.25, 0.3, 0.2))


class TinyNet(nn.Module):
    """Residual addition, functional ReLU, depthwise convolution with a bias, ReLU6, pooling: 1,877 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.bn4 = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 24, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(24)
        self.relu6 = nn.ReLU6()
        self.fc = nn.Linear(24, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x))))))
        x = self.relu6(self.bn4(self.depthwise(x)))
        x = F.relu(self.bn5(self.pointwise(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def toy_pixels(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return uint8 images of noisy coloured gratings and their classes, which are the direction of the grating."""
    rng = torch.Generator().manual_seed(seed)
    label = torch.randint(NUM_CLASSES, (count,), generator=rng)
    angle = (label + 0.3 * torch.rand(count, generator=rng)) * (torch.pi / NUM_CLASSES)
    phase = 2 * torch.pi * torch.rand(count, generator=rng)
    axis = torch.arange(16.0)
    along = angle.cos()[:, None, None] * axis + angle.sin()[:, None, None] * axis[:, None]  # (batch, height, width)
    grating = torch.sin(along + phase[:, None, None])[:, None]
    colour = 0.5 + torch.rand(count, 3, 1, 1, generator=rng)
    noise = torch.randn(count, 3, 16, 16, generator=rng)
    return (127 + 70 * colour * grating + 15 * noise).clamp(0, 255).to(torch.uint8), label


def trained_tiny_net() -> TinyNet:
    """Return a TinyNet that tells the directions apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyNet()
    pixels, label = toy_pixels(2048, seed=1)
    images = SPEC.normalize(pixels)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(96):
        part = slice(step % 32 * 64, step % 32 * 64 + 64)
        optimizer.zero_grad()
        F.cross_entropy(model(images[part]), label[part]).backward()
        optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None
    return model.eval()


# --- one network for each thing that a graph can do -------------------------------------------------------------------


class Head(nn.Module):
    """Average over positions, then the classifier."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class Lambda(nn.Module):
    """A function as a layer; with a tensor of its own, a parameter or ``fixed``, as its second argument."""

    def __init__(self, function: Callable[..., Any], weight: Tensor | None = None, *, fixed: bool = False) -> None:
        super().__init__()
        self.function = function
        if weight is not None and fixed:
            self.register_buffer("weight", weight)
        else:
            self.weight = None if weight is None else nn.Parameter(weight)

    def forward(self, x: Any) -> Any:
        return self.function(x) if self.weight is None else self.function(x, self.weight)


def calibrated(model: nn.Module) -> nn.Module:
    """Let batch norms record smooth noise, and return ``model`` in evaluation mode."""
    coarse = torch.randn(32, SPEC.shape[0], 4, 4, generator=torch.Generator().manual_seed(0))
    for norm in [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]:
        norm.momentum = None
    with torch.no_grad():
        model.train()(F.interpolate(coarse, SPEC.shape[1:], mode="bilinear"))
    return model.eval()


def behind_stem(*layers: nn.Module, channels: int = 8) -> nn.Sequential:
    """Return a trained-looking network with ``layers`` behind convolution, batch norm and ReLU, and a head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        model = calibrated(nn.Sequential(*stem, *layers, Head(channels)))
    assert isinstance(model, nn.Sequential)
    return model.requires_grad_(False)


class Plain(nn.Module):
    """Convolution, batch norm, ReLU; the convolution with or without a bias, the norm with or without parameters."""

    def __init__(self, *, bias: bool, affine: bool = True, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=bias, groups=groups)
        self.bn = nn.BatchNorm2d(6, affine=affine, eps=1e-3)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.conv(F.relu(self.stem(x))))))


class Transposed(nn.Module):
    """A transposed convolution, whose output channels lie on the second axis of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 6, 2, stride=2)
        self.bn = nn.BatchNorm2d(6)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.up(x))))


class LinearNorm(nn.Module):
    """A linear layer followed by a BatchNorm1d."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4)
        self.hidden = nn.Linear(4 * 4 * 4, 9, bias=False)
        self.bn = nn.BatchNorm1d(9)
        self.fc = nn.Linear(9, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.hidden(F.relu(self.conv(x)).flatten(1)))))


class SharedConvolution(nn.Module):
    """One convolution called three times, each time with a batch norm of its own."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=bias)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for norm in self.norms:
            x = F.relu(norm(self.conv(x)))
        return self.head(x)


class PreActivation(nn.Module):
    """Batch norms before convolutions, in two residual blocks; the second norm of each follows a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(4))
        self.last = nn.BatchNorm2d(6)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in (0, 2):
            inner = self.convs[i](F.relu(self.norms[i](x)))
            x = x + self.convs[i + 1](F.relu(self.norms[i + 1](inner)))
        return self.head(F.relu(self.last(x)))


class ReadTwice(nn.Module):
    """A convolution whose output is read by a batch norm and by an addition: it must not be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(F.relu(x + self.bn(x)))


class Fragile(nn.Module):
    """A convolution whose outputs are all positive, by very little, and their roots, which another layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        with torch.no_grad():
            self.first.bias.copy_(0.005 + self.first.weight.abs().sum((1, 2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x.clamp(-1, 1)).sqrt()).mean((2, 3)))


class ManyEdges(nn.Module):
    """Maximum pooling, concatenation, a gate that multiplies, a matrix product and a 1x1 convolution as classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.branch = nn.Conv2d(4, 4, 1)
        self.squeeze = nn.Linear(8, 8)
        self.classifier = nn.Conv2d(8, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        x = torch.cat([x, F.relu(self.branch(x))], 1)
        x = x * torch.sigmoid(self.squeeze(x.mean((2, 3))))[:, :, None, None]
        flat = x.flatten(2)
        attention = torch.matmul(flat.transpose(1, 2), flat).softmax(-1)
        x = torch.matmul(flat, attention).view(-1, 8, 8, 8)
        return self.classifier(F.avg_pool2d(x, 8)).flatten(1)


class Transformer(nn.Module):
    """One pre-norm block of two heads on four by four patches and a class token, as in ViT; no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 17, 8))
        self.first_norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.second_norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        q, k, v = self.qkv(self.first_norm(x)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.second_norm(x))))
        return self.head(self.norm(x)[:, 0])


NETWORKS = {
    "residual": TinyNet,
    "convolution without bias": lambda: Plain(bias=False),
    "convolution with bias": lambda: Plain(bias=True),
    "norm without parameters": lambda: Plain(bias=True, affine=False),
    "depthwise convolution": lambda: Plain(bias=False, groups=6),
    "transposed convolution": Transposed,
    "linear layer with norm": LinearNorm,
    "shared convolution": lambda: SharedConvolution(bias=False),
    "shared convolution with bias": lambda: SharedConvolution(bias=True),
    "norms before convolutions": PreActivation,
    "convolution read twice": ReadTwice,
    "many edges": ManyEdges,
    "transformer": Transformer,
}


def random_network(name: str) -> nn.Module:
    """Return one of ``NETWORKS`` with random weights and statistics that normalise nothing by chance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        model = NETWORKS[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 3)
                if module.affine:
                    nn.init.normal_(module.weight)
                    nn.init.normal_(module.bias)
    return model.eval()
