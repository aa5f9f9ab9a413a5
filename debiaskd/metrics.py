"""What is measured, always: accuracies over groups, and how much of an attribution lies on the object.

All accuracies are in percent, 0 to 100.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd import checks
from debiaskd.boxes import Boxes


@dataclass(frozen=True)
class GroupAccuracy:
    """Accuracies in percent.

    Attributes:
        average: over all samples.
        groups: one for each group id, NaN for an id that no sample has.
        worst_group: the lowest of `groups`.
        unbiased: the mean of `groups`, each counting alike.
        adjusted: the mean of `groups` weighted by their share of the training set, what a test set distributed like
            the training set would give.
    """

    average: float
    groups: tuple[float, ...]
    worst_group: float
    unbiased: float
    adjusted: float


def group_accuracy(correct: Tensor, groups: Tensor, training_groups: Tensor) -> GroupAccuracy:
    """Average, per-group, worst-group, unbiased and adjusted accuracy.

    Groups without samples among `groups` count nowhere; the training shares of the others are scaled to sum to 1.

    Args:
        correct: bool [N], whether each sample is predicted rightly.
        groups: int64 [N], each sample's group ≥ 0.
        training_groups: int64 [M], the groups of the training set.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not fit, no sample, a negative group, or no group in common with training.

    Example:
        >>> import torch
        >>> from debiaskd.metrics import group_accuracy
        >>> correct = torch.tensor([True, True, True, False])
        >>> accuracy = group_accuracy(correct, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]))
        >>> accuracy.groups, accuracy.worst_group, accuracy.adjusted
        ((100.0, 50.0), 50.0, 87.5)
    """
    if checks.tensor("correct", correct).dtype != torch.bool:
        raise TypeError(f"correct must be bool (prediction == label), got {correct.dtype}")
    checks.rank("correct", correct, "[N]")
    for name, ids in (("groups", groups), ("training_groups", training_groups)):
        if checks.tensor(name, ids).dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {ids.dtype}")
        checks.rank(name, ids, "[N]")
        if not ids.numel() or int(ids.min()) < 0:
            raise ValueError(f"{name} must hold ids >= 0, at least one, got {_range(ids)}")
    checks.shape("groups", groups, "[N]", [len(correct)])
    size = 1 + max(int(groups.max()), int(training_groups.max()))
    count = groups.bincount(minlength=size)
    right = groups[correct].bincount(minlength=size)
    share = training_groups.bincount(minlength=size).double() * (count > 0)
    if not bool(share.any()):
        raise ValueError("training_groups must have a group in common with groups, got none")
    each = 100 * right.double() / count
    present = count > 0
    return GroupAccuracy(
        average=100 * float(right.sum()) / len(groups),
        groups=tuple(each.tolist()),
        worst_group=float(each[present].min()),
        unbiased=float(each[present].mean()),
        adjusted=float((each[present] * share[present]).sum() / share.sum()),
    )


def _range(ids: Tensor) -> str:
    return f"values in [{int(ids.min())}, {int(ids.max())}]" if ids.numel() else "none"


def energy_in_box(attribution: Tensor, boxes: Boxes, size: tuple[int, int] | None = None) -> Tensor:
    """The energy pointing game (Wang et al. 2020, Score-CAM; Rao et al. 2023): `Σ M a⁺ / Σ a⁺` for each map.

    `a⁺` is the positive part of the map after bilinear upsampling (align_corners=False), `M` the union of its boxes.

    Args:
        attribution: [N,H,W], raw.
        boxes: of N images, in pixels of `size`.
        size: (height, width) of the images; None: the map's own.

    Returns:
        float32 [N] in [0,1]; 0 where a map has no positive value.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Example:
        >>> import torch
        >>> from debiaskd import Boxes
        >>> from debiaskd.metrics import energy_in_box
        >>> attribution = torch.tensor([[[3.0, 1.0], [-9.0, 0.0]]])
        >>> energy_in_box(attribution, Boxes.from_lists([[[0, 0, 1, 2]]]))
        tensor([0.7500])
    """
    checks.rank("attribution", checks.floating("attribution", attribution), "[N,H,W]")
    if not isinstance(boxes, Boxes):
        raise TypeError(f"boxes must be debiaskd.Boxes, got {type(boxes).__name__}")
    if len(boxes) != len(attribution):
        raise ValueError(f"boxes must be of N={len(attribution)} images, got {len(boxes)}")
    height, width = (attribution.shape[1], attribution.shape[2]) if size is None else checks.size("size", size)
    maps = attribution.detach().float()
    if maps.shape[1:] != (height, width):
        maps = F.interpolate(maps[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]
    positive = maps.clamp(min=0)
    inside = (positive * boxes.mask((height, width)).to(positive)).sum((1, 2))
    total = positive.sum((1, 2))
    return torch.where(total > 0, inside / total.where(total > 0, 1.0), 0.0)
