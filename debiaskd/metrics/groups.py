"""Accuracies over groups, in percent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from debiaskd import checks


@dataclass(frozen=True)
class GroupAccuracies:
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


def group_accuracy(correct: Tensor, groups: Tensor, training_groups: Tensor) -> GroupAccuracies:
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
    check_correct(correct)
    check_groups("groups", groups)
    check_groups("training_groups", training_groups)
    checks.shape("groups", groups, "[N]", [len(correct)])
    size = 1 + max(int(groups.max()), int(training_groups.max()))
    count = groups.bincount(minlength=size)
    right = groups[correct].bincount(minlength=size)
    return accuracies(right, count, training_groups.bincount(minlength=size))


def accuracies(right: Tensor, count: Tensor, training_count: Tensor) -> GroupAccuracies:
    """From what can be added up over batches and ranks: int64 [G] each, with at least one sample."""
    present = count > 0
    share = training_count.double() * present
    if not bool(share.any()):
        raise ValueError("training_groups must have a group in common with groups, got none")
    each = 100 * right.double() / count
    return GroupAccuracies(
        average=100 * float(right.sum()) / float(count.sum()),
        groups=tuple(each.tolist()),
        worst_group=float(each[present].min()),
        unbiased=float(each[present].mean()),
        adjusted=float((each[present] * share[present]).sum() / share.sum()),
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
