"""The CIFAR networks of the distillation literature; any input size works.

Residual networks: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2, with projection
shortcuts, and their wider xK variants (resnet8x4, resnet32x4). Wide residual networks: Zagoruyko and Komodakis, Wide
Residual Networks, BMVC 2016. Parameters bear the names they have in the checkpoints published with CRD (Tian et al.,
Contrastive Representation Distillation, ICLR 2020).
"""

import re
from collections import OrderedDict

from torch import Tensor, nn
from torch.nn.functional import relu

NAMES = (
    "resnet8",
    "resnet14",
    "resnet14x2",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "resnet8x4",
    "resnet32x4",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
)
"""The usual ones, to be offered for a mistyped name; `build` takes every depth and factor."""


def build(name: str, classes: int) -> nn.Module | None:
    """resnet{6n+2}, resnet{6n+2}x{k} or wrn_{6n+4}_{k}: f32 (B, 3, H, W) -> logits f32 (B, classes).

    None for any other name. Convolutions start from the global random number generator.
    """
    if match := re.fullmatch(r"resnet([1-9][0-9]{0,3})(?:x([2-9]|[1-9][0-9]))?", name):
        depth, factor = int(match[1]), int(match[2] or 1)
        if depth >= 8 and depth % 6 == 2:
            return resnet((depth - 2) // 6, factor, classes)
    elif match := re.fullmatch(r"wrn_([1-9][0-9]{0,3})_([1-9][0-9]?)", name):
        depth, factor = int(match[1]), int(match[2])
        if depth >= 10 and depth % 6 == 4:
            return wide_resnet((depth - 4) // 6, factor, classes)
    return None


def resnet(blocks: int, factor: int, classes: int) -> nn.Module:
    """Three stages of `blocks` basic blocks, 16, 32 and 64 times `factor` wide.

    The stem is as wide as the first stage if `factor` is 1, else half as wide, as in the published x4 networks.
    """
    stem = max(16, 8 * factor)
    return _initialise(
        _named(
            conv1=_conv3x3(3, stem),
            bn1=nn.BatchNorm2d(stem),
            relu=nn.ReLU(inplace=True),
            layer1=_stage(BasicBlock, blocks, stem, 16 * factor, stride=1),
            layer2=_stage(BasicBlock, blocks, 16 * factor, 32 * factor, stride=2),
            layer3=_stage(BasicBlock, blocks, 32 * factor, 64 * factor, stride=2),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(64 * factor, classes),
        )
    )


def wide_resnet(blocks: int, factor: int, classes: int) -> nn.Module:
    """Three stages of `blocks` pre-activation blocks, 16, 32 and 64 times `factor` wide, after a stem of 16."""
    return _initialise(
        _named(
            conv1=_conv3x3(3, 16),
            block1=_named(layer=_stage(PreActBlock, blocks, 16, 16 * factor, stride=1)),
            block2=_named(layer=_stage(PreActBlock, blocks, 16 * factor, 32 * factor, stride=2)),
            block3=_named(layer=_stage(PreActBlock, blocks, 32 * factor, 64 * factor, stride=2)),
            bn1=nn.BatchNorm2d(64 * factor),
            relu=nn.ReLU(inplace=True),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(64 * factor, classes),
        )
    )


class BasicBlock(nn.Module):
    """relu(x + F(x)); where the width changes, x is projected by a normalised 1×1 convolution."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = _conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            if inputs != width
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return relu(out + (self.downsample(x) if self.downsample else x), inplace=True)


class PreActBlock(nn.Module):
    """x + F(relu(bn(x))); where the width changes, the activated x is projected by a 1×1 convolution instead."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3x3(inputs, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width)
        self.convShortcut = nn.Conv2d(inputs, width, 1, stride, bias=False) if inputs != width else None

    def forward(self, x: Tensor) -> Tensor:
        active = relu(self.bn1(x), inplace=True)
        out = self.conv2(relu(self.bn2(self.conv1(active)), inplace=True))
        return out + (self.convShortcut(active) if self.convShortcut else x)


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _stage(block: type[nn.Module], blocks: int, inputs: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(block(inputs, width, stride), *(block(width, width, 1) for _ in range(blocks - 1)))


def _conv3x3(inputs: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)


def _initialise(network: nn.Module) -> nn.Module:
    """Convolutions as in He et al., Delving Deep into Rectifiers, ICCV 2015, by the fan-out."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
