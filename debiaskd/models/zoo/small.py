"""Small convolutional networks with timm's protocol."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class SmallNet(nn.Module):
    """3×3 convolutions with batch norm and ReLU, global average pooling, one linear layer.

    Args:
        widths: channels of each convolution.
        strides: stride of each, as many.
        num_classes: K.

    Raises:
        ValueError: `widths` and `strides` of different lengths, or empty.

    Example:
        >>> import torch
        >>> net = SmallNet((8, 16), (2, 2), num_classes=2)
        >>> images = torch.randn(4, 3, 48, 48)
        >>> net.forward_features(images).shape, net(images).shape
        (torch.Size([4, 16, 12, 12]), torch.Size([4, 2]))
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int], num_classes: int) -> None:
        super().__init__()
        if len(widths) != len(strides) or not widths:
            raise ValueError(f"widths and strides must be as many, >= 1, got {len(widths)} and {len(strides)}")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels = 3
        for number, (width, stride) in enumerate(zip(widths, strides), start=1):
            layers[f"conv{number}"] = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
            layers[f"bn{number}"] = nn.BatchNorm2d(width)
            layers[f"relu{number}"] = nn.ReLU()
            channels = width
        self.body = nn.Sequential(layers)
        self.fc = nn.Linear(channels, num_classes)
        self.num_features = channels
        self.num_classes = num_classes

    def forward_features(self, images: Tensor) -> Tensor:
        """The last feature map [N,C,H,W] of images [N,3,S,S]."""
        feature: Tensor = self.body(images)
        return feature

    def forward_head(self, feature: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [N,K] of a map [N,C,H,W]; with `pre_logits` the pooled features [N,C]."""
        pooled = feature.mean((2, 3))
        if pre_logits:
            return pooled
        logits: Tensor = self.fc(pooled)
        return logits

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


class CifarResNet(nn.Module):
    """The ResNets for 32×32 images of He et al. 2016, depth 6n + 2, shortcuts that pad with zeros (their option A).

    Args:
        depth: 20, 32, 44, 56, …
        num_classes: K.

    Raises:
        ValueError: a depth that is not 6n + 2, n ≥ 1.

    Example:
        >>> import torch
        >>> net = CifarResNet(20, num_classes=10)
        >>> net.forward_features(torch.randn(2, 3, 32, 32)).shape, sum(p.numel() for p in net.parameters())
        (torch.Size([2, 64, 8, 8]), 269722)
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 with n >= 1, got {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)
        self.num_features = 64
        self.num_classes = num_classes

    def forward_features(self, images: Tensor) -> Tensor:
        """The last feature map [N,64,S/4,S/4]."""
        feature = self.bn1(self.conv1(images)).relu()
        feature = self.layer3(self.layer2(self.layer1(feature)))
        return feature  # type: ignore[no-any-return]

    def forward_head(self, feature: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [N,K] of a map; with `pre_logits` the pooled features [N,64]."""
        pooled = feature.mean((2, 3))
        return pooled if pre_logits else self.linear(pooled)

    def get_classifier(self) -> nn.Linear:
        return self.linear

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *(_Block(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(blocks))
    )


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, feature: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.bn1(self.conv1(feature)).relu()))
        shortcut = feature[:, :, :: self.stride, :: self.stride]
        if self.padding:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding))
        return (residual + shortcut).relu()  # type: ignore[no-any-return]
