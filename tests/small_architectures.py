"""Architectures of timm and torchvision with one or two blocks of each kind, built by the libraries' own code."""

from functools import partial

import timm.models.resnetv2
import torch
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn
from torchvision.models import mobilenetv3, shufflenetv2
from torchvision.models.googlenet import BasicConv2d, Inception, InceptionAux

NUM_CLASSES = 10


def mobilenet_of_tensorflow() -> nn.Module:
    """As timm's tf_mobilenetv3_small_minimal_100: images are padded on one side more than on the other."""
    blocks = decode_arch_def([["ds_r1_k3_s2_e1_c8"], ["ir_r2_k3_s2_e4_c16"], ["cn_r1_k1_s1_c48"]])
    return MobileNetV3(blocks, NUM_CLASSES, stem_size=8, num_features=64, pad_type="same", act_layer=nn.ReLU)


def resnet_v2() -> nn.Module:
    """As timm's resnetv2_18."""
    return timm.models.resnetv2.ResNetV2(
        layers=[1, 1],
        channels=(16, 32),
        num_classes=NUM_CLASSES,
        stem_chs=8,
        basic=True,
        bottle_ratio=1.0,
        conv_layer=create_conv2d,
        norm_layer=BatchNormAct2d,
    )


class GoogLeNet(nn.Module):
    """As torchvision's, whose depth cannot be chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = BasicConv2d(3, 16, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a = Inception(16, 8, 12, 16, 4, 8, 8)
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception4a = Inception(40, 16, 12, 16, 4, 8, 8)
        self.aux1 = InceptionAux(48, NUM_CLASSES)
        self.avgpool, self.dropout, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Dropout(0.2), nn.Linear(48, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.inception4a(self.maxpool3(self.inception3a(self.maxpool1(self.conv1(x)))))
        logits = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        return (logits, self.aux1(x)) if self.training else logits


def shufflenet_v2() -> nn.Module:
    """As torchvision's shufflenet_v2_x0_5: the second block of a stage splits the channels."""
    return shufflenetv2.ShuffleNetV2([2, 1, 1], [8, 16, 24, 32, 48], NUM_CLASSES)


def mobilenet_v3() -> nn.Module:
    """As torchvision's mobilenet_v3_small."""
    block = partial(mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1.0)
    blocks = [
        block(16, 3, 16, 16, True, "RE", 1),
        block(16, 5, 48, 24, True, "HS", 2),
    ]
    return mobilenetv3.MobileNetV3(blocks, 64, NUM_CLASSES)
