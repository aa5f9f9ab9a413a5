"""Sources of teacher outputs: the teacher itself, or outputs that were computed before."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from debiaskd.attribution.explainer import Explainer
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


class WholeTeacher(Frozen):
    """A frozen teacher as one network from images to logits, which records the feature between its body and its head.

    Args:
        teacher: cut or not; its tensors are shared.
    """

    def __init__(self, teacher: FrozenTeacher | FrozenExtractor) -> None:
        super().__init__()
        self.teacher = teacher
        self.recording = False  # a copy of the network must not hold the outputs of an earlier pass
        self.recorded: Outputs | None = None
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.teacher, FrozenExtractor):
            outputs = self.teacher.outputs(images)
        else:
            feature: Tensor = self.teacher.body(images)
            pooled = self.teacher.forward_head(feature, pre_logits=True)
            outputs = Outputs(feature, pooled, self.teacher.forward_head(feature))
        self.recorded = outputs if self.recording else None
        return outputs.logits

    def explain(self, explainer: Explainer, images: Tensor, target: Tensor | None) -> Outputs:
        """All outputs and the attribution maps, in one pass; `explainer` is of this network."""
        self.recording = True
        try:
            _, classes, maps = explainer.explain(images, target)
            recorded = self.recorded
        finally:
            self.recording, self.recorded = False, None
        assert recorded is not None
        feature, pooled = (None if value is None else value.detach() for value in recorded[:2])
        return Outputs(feature, pooled, recorded.logits.detach(), maps, classes)

    def submodule(self, name: str) -> str:
        """The name here of a module of the teacher as it was before it was cut and frozen."""
        return f"teacher.body.model.{name}"


class LiveTeacher:
    """Teacher outputs computed for every batch.

    Args:
        teacher: of them.
        explainer: of a `WholeTeacher` of it, whose attribution maps are wanted besides.
        labels: whether the maps are of the labels' classes instead of those that the teacher ranks first.
    """

    def __init__(
        self,
        teacher: FrozenTeacher | FrozenExtractor,
        explainer: Explainer | None = None,
        *,
        labels: bool = False,
    ) -> None:
        self.teacher, self.explainer, self.labels = teacher, explainer, labels
        self.width = teacher.num_features if isinstance(teacher, FrozenExtractor) else teacher.head.in_features
        self.views: int | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch, epoch: int, numbers: Tensor | None = None) -> Outputs:
        images = batch.images if batch.teacher_images is None else batch.teacher_images
        if self.explainer is not None:
            whole = self.explainer.model
            assert isinstance(whole, WholeTeacher)
            return whole.explain(self.explainer, images, batch.target if self.labels else None)
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
        logits = self.outputs.logits[batch.index]
        others = (_rows(value, batch.index) for value in (*self.outputs[:2], *self.outputs[3:]))
        feature, pooled, explanation, explained = others
        return Outputs(feature, pooled, logits, explanation, explained)

    def to(self, device: torch.device) -> InMemoryTeacher:
        feature, pooled, logits, explanation, explained = (
            None if value is None else value.to(device) for value in self.outputs
        )
        assert logits is not None
        self.outputs = Outputs(feature, pooled, logits, explanation, explained)
        return self


def _rows(tensor: Tensor | None, index: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[index]
