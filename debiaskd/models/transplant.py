"""DeTT's student: `h_t(pool(P(f_s(x))))`, a student's body, a projector `P` and the teacher's frozen head `h_t`.

Lee & Lee 2023, "Debiased Distillation by Transplanting the Last Layer" (arXiv 2302.11187); the projector follows
SimKD, Chen et al. 2022, "Knowledge Distillation with the Reused Teacher Classifier".
"""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F

from debiaskd.models.cut import Body, Cut, cut, demote_unreached, last_map
from debiaskd.models.frozen_teacher import FrozenTeacher
from debiaskd.models.heads import Head
from debiaskd.models.layouts import LayoutError
from debiaskd.models.modules import has_protocol, named_module
from debiaskd.models.projector import PROJECTORS, make_projector
from debiaskd.models.teacher_source import Source, find_source
from debiaskd.models.trial_inputs import runnable
from debiaskd.utils import checks

Names: TypeAlias = "str | tuple[str | None, str | None] | None"


class Transplanted(nn.Module):
    """Student made by `transplant`. It has timm's protocol.

    Attributes:
        body: the student up to its last feature map, trained.
        projector: [N,C_s,H,W] → [N,C_t,H,W], trained.
        head: the teacher's head, frozen: its tensors are buffers, it stays in eval mode.
        num_features: C_t, the channels that `forward_features` gives.
        num_classes: K, the teacher's number of classes.
    """

    def __init__(self, body: Body, projector: nn.Module, head: Head, num_features: int) -> None:
        super().__init__()
        self.body = body
        self.projector = projector
        self.head = head
        self.num_features = num_features
        self.num_classes = head.num_classes

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the projected map `P(f_s(x))`, [N,C_t,H,W], for `match_spatial` with the teacher's features."""
        feature: Tensor = self.projector(self.body(images))
        return feature

    def forward_head(self, feature: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits [N,K] of a map [N,C_t,H,W]; with `pre_logits` the pooled features that the last layer reads."""
        output: Tensor = self.head(feature, pre_logits=pre_logits)
        return output

    def get_classifier(self) -> Any:
        """Return the teacher's last layer, its tensors as buffers; a `ModuleList` if its logits come from several
        layers.
        """
        return self.head.get_classifier()

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def transplant(
    teacher: nn.Module,
    student: nn.Module,
    *,
    projector: str = "depthwise",
    layer: Names = None,
    head: Names = None,
    example: Tensor | None = None,
) -> Transplanted:
    """Build a student from a trained body, a trained projector and the teacher's frozen head.

    Both models are copied and not changed; the random state is only used to initialise the projector. The student's own
    classifier is dropped. The result has the student's device, dtype and mode.

    Args:
        teacher: the debiased model, [N,...] images to [N,K] logits; or its `FrozenTeacher`, which needs no names.
        student: the model whose body is used; its classifier is ignored.
        projector: hidden width C_t // 2, batch norm and ReLU after each convolution, for the first two:
            "depthwise" 1×1, 3×3 depthwise, 1×1 convolutions; "dense" the same with a full 3×3 (SimKD's code);
            "linear" one 1×1 convolution with bias; "identity" no layers, for equal widths. If the teacher's map has
            negative values, the last ReLU is left out, because it could not reach them.
        layer: the layer whose output is the last feature map before global pooling. One name for both models, or
            (teacher's, student's). None, also within the pair: timm's protocol (`forward_features`, ...), else the last
            map that a module outputs.
        head: the teacher's last layer, likewise. None: `get_classifier()`, else the layers whose outputs are the
            logits. The student's head is checked if a pair names it, but not used.
        example: a batch of input [N,...] for the trial run, for models that run on no common image size (64×64,
            the model's own, 224×224, 32×32 or 28×28 pixels, with the channels of its first convolution).

    Returns:
        The student. `forward_features(x)` returns the projected map, `forward_head(map)` its logits,
            `forward(x)` the logits of images.

    Raises:
        TypeError: a model that is not a module, names that are not strings, a teacher without a last layer.
        ValueError: an unknown projector or name, an output that is no feature map, "identity" for different widths,
            a teacher whose logits can be computed neither from its feature map nor from vectors that its last layers
            read.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from debiaskd.models.transplant import transplant
        >>> def network(width):
        ...     body = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU())
        ...     return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))
        >>> model = transplant(network(32), network(8), layer="0", head="3")
        >>> model(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4, 2])
        >>> model.forward_features(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4, 32, 15, 15])
    """
    checks.option("projector", projector, PROJECTORS)
    teacher_layer, student_layer = _pair("layer", layer)
    teacher_head, student_head = _pair("head", head)
    if isinstance(teacher, FrozenTeacher):
        source = Source(copy.deepcopy(teacher.head), None, teacher.level, teacher.num_features, teacher.nonnegative)
    else:
        source = find_source(teacher, teacher_layer, teacher_head, example)
    target = _student(student, student_layer, example)
    demote_unreached(target.body, target.images)
    if isinstance(head, (tuple, list)) and student_head is not None:
        named_module("head", "student", student, student_head)
    if projector == "identity" and source.channels != target.channels:
        raise ValueError(
            f"projector 'identity' must join maps of equal widths, got a teacher of {source.channels} channels "
            f"and a student of {target.channels}"
        )
    model = Transplanted(
        copy.deepcopy(target.body),
        make_projector(projector, target.channels, source.channels, nonnegative=source.nonnegative),
        source.head,
        source.channels,
    )
    model.projector.to(target.raw)
    model.head.to(target.raw)
    model.projector.train(student.training)
    model.training = student.training
    return model


def _student(student: nn.Module, layer: str | None, example: Tensor | None) -> Cut:
    runnable("student", student)
    try:
        if layer is not None or has_protocol(student):
            return cut("student", student, layer, example)
    except LayoutError:
        if layer is not None:
            raise
    return cut("student", student, last_map("student", student, example), example)


def _pair(argument: str, names: object) -> tuple[str | None, str | None]:
    if names is None or isinstance(names, str):
        return names, names
    if isinstance(names, (tuple, list)) and len(names) == 2 and all(n is None or isinstance(n, str) for n in names):
        return names[0], names[1]
    raise TypeError(f"{argument} must be a name, a (teacher, student) pair of names, or None, got {names!r}")


def match_spatial(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Pool the student's feature map and the teacher's features to a common size.

    Two maps: the larger is adaptively average-pooled to the smaller. Height and width are compared separately; a map of
    the right size is returned unchanged. A teacher at token level gives a vector: the student's map is averaged.

    Args:
        student: [N,C,H,W].
        teacher: [N,C',H',W'], or [N,D].

    Returns:
        [N,C,min(H,H'),min(W,W')] and [N,C',min(H,H'),min(W,W')]; or [N,C] and [N,D].

    Raises:
        TypeError: not floating tensors.
        ValueError: other dimensions, or different N.

    Example:
        >>> import torch
        >>> from debiaskd.models.transplant import match_spatial
        >>> a, b = match_spatial(torch.randn(2, 8, 14, 14), torch.randn(2, 8, 7, 7))
        >>> a.shape, b.shape
        (torch.Size([2, 8, 7, 7]), torch.Size([2, 8, 7, 7]))
        >>> a, b = match_spatial(torch.randn(2, 8, 14, 14), torch.randn(2, 8))
        >>> a.shape
        torch.Size([2, 8])
    """
    checks.rank("student", checks.floating("student", student), "[N,C,H,W]")
    if checks.floating("teacher", teacher).dim() != 2:
        checks.rank("teacher", teacher, "[N,C,H,W]")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"teacher must have the batch size of student, {student.shape[0]}, got {teacher.shape[0]}")
    if teacher.dim() == 2:
        return student.mean((2, 3)), teacher
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    pooled = [value if value.shape[2:] == size else F.adaptive_avg_pool2d(value, size) for value in (student, teacher)]
    return pooled[0], pooled[1]
