"""Where a teacher's answers come from: the teacher itself, or what it once said of every picture."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from debiaskd.data import Batch
from debiaskd.terms import Outputs
from debiaskd.transplant import FrozenTeacher


class Teaching(Protocol):
    """Gives the teacher's outputs for a batch of an epoch; `numbers` are its pictures', on the host.

    width: of its pooled features. views: how many fixed augmentations of a picture it knows; None: it knows any.
    """

    width: int
    views: int | None

    def __call__(self, batch: Batch, epoch: int, numbers: Tensor | None = None) -> Outputs: ...

    def to(self, device: torch.device) -> Teaching: ...


class Live:
    """The teacher looks at every batch."""

    def __init__(self, teacher: FrozenTeacher) -> None:
        self.teacher = teacher
        self.width: int = teacher.get_classifier().in_features
        self.views: int | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch, epoch: int, numbers: Tensor | None = None) -> Outputs:
        images = batch.images if batch.teacher_images is None else batch.teacher_images
        feature = self.teacher.forward_features(images)
        pooled = self.teacher.forward_head(feature, pre_logits=True)
        return Outputs(feature, pooled, self.teacher.get_classifier()(pooled))

    def to(self, device: torch.device) -> Live:
        self.teacher.to(device)
        return self


class Remembered:
    """What it said of each of N pictures that are the same every time, in memory.

    Args:
        outputs: [N,...] each, by the pictures' numbers.
    """

    def __init__(self, outputs: Outputs) -> None:
        self.outputs = outputs
        self.width = 0 if outputs.pooled is None else outputs.pooled.shape[1]
        self.views: int | None = None

    def __call__(self, batch: Batch, epoch: int, numbers: Tensor | None = None) -> Outputs:
        assert batch.index is not None
        feature, pooled, logits = self.outputs
        return Outputs(_rows(feature, batch.index), _rows(pooled, batch.index), logits[batch.index])

    def to(self, device: torch.device) -> Remembered:
        feature, pooled, logits = self.outputs
        self.outputs = Outputs(
            None if feature is None else feature.to(device),
            None if pooled is None else pooled.to(device),
            logits.to(device),
        )
        return self


def _rows(tensor: Tensor | None, index: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[index]
