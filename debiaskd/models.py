"""Small convolutional networks that speak timm's protocol, so that nothing needs to be told their layers' names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn


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
