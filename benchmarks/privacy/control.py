"""A network that knows its images by heart: where leaking is most likely, and a reference that never saw them."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from qimera import InputSpec, Teacher

NUM_IMAGES = 500
"""That a control is trained on."""

NUM_EPOCHS = 60
_BATCH = 50
SPEC = InputSpec(shape=(3, 32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


def control_teacher(images: np.ndarray, labels: np.ndarray, path: Path, seed: int) -> Teacher:
    """Return a network trained on ``images`` (n, 32, 32, 3) without augmentation until it makes no mistake.

    The statistics in its batch norms are exactly those of the images.

    Args:
        images: As pixels.
        labels: Their classes.
        path: Where its weights are kept, or were kept before.
        seed: Of weights and order.
    """
    torch.manual_seed(seed)
    model = _network()
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        _train_(model, SPEC.normalize(torch.from_numpy(images).permute(0, 3, 1, 2)), torch.from_numpy(labels))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    return Teacher.capture(model.eval(), SPEC)


def _network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def _train_(model: nn.Sequential, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_EPOCHS)
    for epoch in range(NUM_EPOCHS):
        for chosen in torch.randperm(len(images)).split(_BATCH):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1} of {NUM_EPOCHS}: loss {loss.item():.4f}", flush=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over what follows: one batch of all images
    with torch.no_grad():
        model(images)
