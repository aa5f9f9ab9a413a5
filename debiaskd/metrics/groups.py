"""Accuracies over groups, in percent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from debiaskd.utils import checks


@dataclass(frozen=True)
class GroupAccuracies:
    """Accuracies in percent.

    Attributes:
        average: accuracy over all samples.
        groups: accuracy of each group id, NaN for an id without samples.
        worst_group: the lowest of `groups`.
        unbiased: the unweighted mean of `groups`.
        adjusted: the mean of `groups` weighted by their share of the training set: the accuracy on a test set
            distributed like the training set. NaN if no group is in both, or the training groups are unknown.
        smallest: number of samples of the smallest non-empty group, which limits how far `worst_group` can be trusted.
    """

    average: float
    groups: tuple[float, ...]
    worst_group: float
    unbiased: float
    adjusted: float
    smallest: int


def group_accuracy(correct: Tensor, groups: Tensor, training_groups: Tensor | None = None) -> GroupAccuracies:
    """Compute average, per-group, worst-group, unbiased and adjusted accuracy.

    Groups without samples in `groups` are ignored; the training shares of the others are scaled to sum to 1. A group
    without training samples has a share of 0. Without a common group the adjusted accuracy is NaN.

    Args:
        correct: bool [N], whether each sample is predicted correctly.
        groups: int64 [N], each sample's group ≥ 0.
        training_groups: int64 [M], the groups of the training set; None: unknown, `adjusted` is NaN.

    Raises:
        TypeError: wrong dtypes.
        ValueError: shapes that do not match, no sample, or a negative group.

    Example:
        >>> import torch
        >>> from debiaskd.metrics import group_accuracy
        >>> correct = torch.tensor([True, True, True, False])
        >>> accuracy = group_accuracy(correct, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]))
        >>> accuracy.groups, accuracy.worst_group, accuracy.adjusted
        ((100.0, 50.0), 50.0, 87.5)
    """
    check_correct(correct)
    check_groups("groups", groups)
    checks.shape("groups", groups, "[N]", [len(correct)])
    size = 1 + int(groups.max())
    if training_groups is not None:
        check_groups("training_groups", training_groups)
        size = max(size, 1 + int(training_groups.max()))
    count = groups.bincount(minlength=size)
    right = groups[correct].bincount(minlength=size)
    training_count = torch.zeros_like(count) if training_groups is None else training_groups.bincount(minlength=size)
    return accuracies(right, count, training_count)


def accuracies(right: Tensor, count: Tensor, training_count: Tensor) -> GroupAccuracies:
    """From what can be added up over batches and ranks: int64 [G] each, with at least one sample."""
    present = count > 0
    share = training_count.double()[present]
    each = 100 * right.double() / count
    return GroupAccuracies(
        average=100 * float(right.sum()) / float(count.sum()),
        groups=tuple(each.tolist()),
        worst_group=float(each[present].min()),
        unbiased=float(each[present].mean()),
        adjusted=float((each[present] * share).sum() / share.sum()),  # 0 / 0 where no group is in both
        smallest=int(count[present].min()),
    )


def check_correct(correct: Tensor) -> None:
    if checks.tensor("correct", correct).dtype != torch.bool:
        raise TypeError(f"correct must be bool (prediction == label), got {correct.dtype}")
    checks.rank("correct", correct, "[N]")


def check_groups(name: str, ids: Tensor) -> None:
    """Ids of at least one sample."""
    if checks.tensor(name, ids).dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {ids.dtype}")
    checks.rank(name, ids, "[N]")
    if not ids.numel() or int(ids.min()) < 0:
        raise ValueError(f"{name} must hold ids >= 0, at least one, got {_range(ids)}")


def _range(ids: Tensor) -> str:
    return f"values in [{int(ids.min())}, {int(ids.max())}]" if ids.numel() else "none"
