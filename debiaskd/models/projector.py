"""Projectors from a student's feature map to the width of the teacher's."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROJECTORS = ("depthwise", "dense", "linear", "identity")


def make_projector(kind: str, inputs: int, outputs: int, *, nonnegative: bool = True) -> nn.Module:
    """The projector [N,inputs,H,W] → [N,outputs,H,W]; `nonnegative` keeps the ReLU at its end."""
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Conv2d(inputs, outputs, 1)
    hidden = max(outputs // 2, 1)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(inputs, hidden, 1, bias=False),
        bn1=nn.BatchNorm2d(hidden),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden if kind == "depthwise" else 1, bias=False),
        bn2=nn.BatchNorm2d(hidden),
        relu2=nn.ReLU(),
        conv3=nn.Conv2d(hidden, outputs, 1, bias=False),
        bn3=nn.BatchNorm2d(outputs),
        relu3=LastReLU(signed=not nonnegative),
    )
    return nn.Sequential(layers)


class LastReLU(nn.Module):
    """ReLU, or the identity if the teacher's maps are signed.

    Which of them is part of the state: a model rebuilt around another teacher must compute what was trained.
    """

    signed: Tensor

    def __init__(self, signed: bool) -> None:
        super().__init__()
        self.register_buffer("signed", torch.tensor(signed))

    def forward(self, feature: Tensor) -> Tensor:
        return torch.where(self.signed, feature, F.relu(feature))
