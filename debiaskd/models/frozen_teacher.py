"""A frozen copy of a teacher that gives features and logits."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.models.heads import Frozen, freeze
from debiaskd.models.teacher_source import Level, find_source


class FrozenTeacher(Frozen):
    """A frozen copy of a teacher that computes targets: `forward(images)` returns (features, logits [N,K]).

    The features are the target of feature matching: at map level the last feature map [N,C_t,H,W], at token level the
    vector [N,D] that the last layers read (a class token, for example).

    It stays in eval mode when `train()` is called on a parent, runs without gradients, and its tensors are buffers: it
    has no parameters to optimize, and its batch norm statistics never change. The original teacher is not changed. Do
    not save it with the student.

    Args:
        teacher: as for `transplant`.
        layer: the layer whose output is the last feature map; None: timm's protocol.
        head: the last layer; None: `get_classifier()`, or the layers whose outputs are the logits.
        example: as for `transplant`.

    Attributes:
        level: "map" or "token".
        num_features: C_t or D.
        num_classes: K.

    Raises:
        TypeError, ValueError: as `transplant` for its teacher.

    Example:
        >>> import torch
        >>> from torch import nn

        >>> teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        >>> feature, logits = FrozenTeacher(teacher, layer="0", head="3")(torch.randn(4, 3, 16, 16))
        >>> feature.shape, logits.shape, feature.requires_grad
        (torch.Size([4, 8, 14, 14]), torch.Size([4, 2]), False)
    """

    def __init__(
        self, teacher: nn.Module, *, layer: str | None = None, head: str | None = None, example: Tensor | None = None
    ) -> None:
        super().__init__()
        source = find_source(teacher, layer, head, example)
        assert source.body is not None
        self.head = source.head
        self.body = freeze(copy.deepcopy(source.body))
        self.level: Level = source.level
        self.num_features, self.nonnegative = source.channels, source.nonnegative
        self.num_classes = self.head.num_classes
        self.eval()

    def forward_features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            feature: Tensor = self.body(images)
            return feature

    def forward_head(self, feature: Tensor, pre_logits: bool = False) -> Tensor:
        output: Tensor = self.head(feature, pre_logits=pre_logits)
        return output

    def get_classifier(self) -> Any:
        return self.head.get_classifier()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            feature = self.forward_features(images)
            return feature, self.forward_head(feature)
