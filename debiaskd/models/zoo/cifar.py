"""CIFAR networks of the distillation papers, in timm's protocol, built by name in `debiaskd.models.registry`.

Wide ResNets (Zagoruyko & Komodakis 2016), VGG (Simonyan & Zisserman 2015) of 8 layers, a ResNet-50 (He et al. 2016) and
a MobileNetV2 (Sandler et al. 2018) of half width, both with a first layer that does not shrink the image.
`debiaskd.models.CifarResNet` are the ResNets of depth 6n + 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Headed(nn.Module):
    """A body [N,3,S,S] → [N,C,H,W], global average pooling, one linear layer."""

    def __init__(self, body: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.body = body
        self.fc = nn.Linear(width, num_classes)
        self.num_features, self.num_classes = width, num_classes

    def forward_features(self, images: Tensor) -> Tensor:
        feature: Tensor = self.body(images)
        return feature

    def forward_head(self, feature: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = feature.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def _unit(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs), nn.ReLU())


class _PreActivated(nn.Module):
    """Batch norm and ReLU before each of two convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.rest = nn.Sequential(
            _conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs), nn.ReLU(), _conv(outputs, outputs)
        )
        self.shortcut = None if inputs == outputs and stride == 1 else _conv(inputs, outputs, 1, stride)

    def forward(self, feature: Tensor) -> Tensor:
        active = self.first(feature)
        shortcut = feature if self.shortcut is None else self.shortcut(active)
        total: Tensor = shortcut + self.rest(active)
        return total


def wide_resnet(depth: int, widen: int, num_classes: int) -> Headed:
    """WRN-depth-widen, depth 6n + 4.

    Raises:
        ValueError: another depth.
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1 or widen < 1:
        raise ValueError(f"depth must be 6n + 4 with n >= 1 and widen >= 1, got {depth} and {widen}")
    layers: list[nn.Module] = [_conv(3, 16)]
    inputs = 16
    for stage, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
        for block in range(blocks):
            layers.append(_PreActivated(inputs, width, 2 if stage and not block else 1))
            inputs = width
    return Headed(nn.Sequential(*layers, nn.BatchNorm2d(inputs), nn.ReLU()), inputs, num_classes)


def vgg8(num_classes: int, widths: Sequence[int] = (64, 128, 256, 512, 512)) -> Headed:
    """Five convolutions, of which the first three are followed by a pooling that halves the map."""
    layers: list[nn.Module] = []
    inputs = 3
    for number, width in enumerate(widths):
        layers.append(_unit(inputs, width))
        if number < 3:
            layers.append(nn.MaxPool2d(2))
        inputs = width
    return Headed(nn.Sequential(*layers), inputs, num_classes)


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.rest = nn.Sequential(
            _unit(inputs, width, 1), _unit(width, width, 3, stride), _conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        )

    def forward(self, feature: Tensor) -> Tensor:
        total: Tensor = (self.shortcut(feature) + self.rest(feature)).relu()
        return total


def resnet50(num_classes: int) -> Headed:
    layers: list[nn.Module] = [_unit(3, 64)]
    inputs = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            layers.append(_Bottleneck(inputs, width, 2 if stage and not block else 1))
            inputs = 4 * width
    return Headed(nn.Sequential(*layers), inputs, num_classes)


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = [] if expand == 1 else [_unit(inputs, hidden, 1)]
        layers += [_unit(hidden, hidden, 3, stride, hidden), _conv(hidden, outputs, 1), nn.BatchNorm2d(outputs)]
        self.rest = nn.Sequential(*layers)
        self.added = stride == 1 and inputs == outputs

    def forward(self, feature: Tensor) -> Tensor:
        made: Tensor = self.rest(feature)
        return feature + made if self.added else made


def mobilenetv2(num_classes: int, width: float = 0.5, expand: int = 6) -> Headed:
    """Of this share of the usual widths."""
    inputs = int(32 * width)
    layers: list[nn.Module] = [_unit(3, inputs, 3, 2)]
    table = ((1, 16, 1, 1), (expand, 24, 2, 1), (expand, 32, 3, 2), (expand, 64, 4, 2))
    for ratio, channels, blocks, stride in (*table, (expand, 96, 3, 1), (expand, 160, 3, 2), (expand, 320, 1, 1)):
        for block in range(blocks):
            outputs = int(channels * width)
            layers.append(_Inverted(inputs, outputs, 1 if block else stride, ratio))
            inputs = outputs
    last = int(1280 * width) if width > 1 else 1280
    layers.append(_unit(inputs, last, 1))
    return Headed(nn.Sequential(*layers), last, num_classes)
