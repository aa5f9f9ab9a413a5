"""Sources of teacher outputs: the teacher itself, or outputs that were computed before."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from debiaskd.data import Batch
from debiaskd.models.frozen_teacher import FrozenTeacher
from debiaskd.models.heads import Frozen, freeze
from debiaskd.terms import Outputs
from debiaskd.training.feature_extraction import FeatureExtractor, FeatureLayers


class TeacherOutputs(Protocol):
    """Return the teacher's outputs for a batch of an epoch; `numbers` are the images' numbers, on the host.

    width: of its pooled features. views: how many fixed augmentations of an image it knows; None: it knows any.
    """

    width: int
    views: int | None

    def __call__(self, batch: Batch, epoch: int, numbers: Tensor | None = None) -> Outputs: ...

    def to(self, device: torch.device) -> TeacherOutputs: ...


class FrozenExtractor(Frozen):
    """A frozen, complete teacher whose features are recorded; it is not cut into body and head.

    Args:
        teacher: any module from images to logits; it is copied.
        at: see `FeatureExtractor`.
        wanted: any of "feature" and "pooled": what is given beside the logits.
    """

    def __init__(self, teacher: nn.Module, at: FeatureLayers | None, wanted: Iterable[str]) -> None:
        super().__init__()
        self.body = freeze(FeatureExtractor(copy.deepcopy(teacher), at, wanted))
        self.num_features = 0 if at is None else at.pooled_width
        self.eval()

    def outputs(self, images: Tensor) -> Outputs:
        outputs: Outputs = self.body(images)[0]
        return outputs


class LiveTeacher:
    """Teacher outputs computed for every batch."""

    def __init__(self, teacher: FrozenTeacher | FrozenExtractor) -> None:
        self.teacher = teacher
        self.width = teacher.num_features if isinstance(teacher, FrozenExtractor) else teacher.head.in_features
        self.views: int | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch, epoch: int, numbers: Tensor | None = None) -> Outputs:
        images = batch.images if batch.teacher_images is None else batch.teacher_images
        if isinstance(self.teacher, FrozenExtractor):
            return self.teacher.outputs(images)
        feature = self.teacher.forward_features(images)
        pooled = self.teacher.forward_head(feature, pre_logits=True)
        return Outputs(feature, pooled, self.teacher.forward_head(feature))

    def to(self, device: torch.device) -> LiveTeacher:
        self.teacher.to(device)
        return self


class InMemoryTeacher:
    """Teacher outputs of N images without augmentation, in memory.

    Args:
        outputs: [N,...] each, by the images' numbers.
    """

    def __init__(self, outputs: Outputs) -> None:
        self.outputs = outputs
        self.width = 0 if outputs.pooled is None else outputs.pooled.shape[1]
        self.views: int | None = None

    def __call__(self, batch: Batch, epoch: int, numbers: Tensor | None = None) -> Outputs:
        assert batch.index is not None
        feature, pooled, logits = self.outputs
        return Outputs(_rows(feature, batch.index), _rows(pooled, batch.index), logits[batch.index])

    def to(self, device: torch.device) -> InMemoryTeacher:
        feature, pooled, logits = self.outputs
        self.outputs = Outputs(
            None if feature is None else feature.to(device),
            None if pooled is None else pooled.to(device),
            logits.to(device),
        )
        return self


def _rows(tensor: Tensor | None, index: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[index]
