"""Confidence intervals for accuracies over groups, and for the difference between two methods on the same images.

The bootstrap resamples images within groups: every resample has the same number of images of each group, so that the
smallest group determines the width of the worst group's interval. Predictions are correct or incorrect, so a resample
of a group is a binomial draw (multinomial for two methods). The minimum over groups is taken inside each resample,
because the worst group is not known in advance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from debiaskd.metrics.groups import check_correct, check_groups
from debiaskd.utils import checks


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, as fractions in [-1,1].

    Attributes:
        value: the estimate on the images.
        low, high: percentiles of the resamples.
        smallest: images of the smallest group.
    """

    value: float
    low: float
    high: float
    smallest: int


def worst_group_interval(
    correct: Tensor, groups: Tensor, *, level: float = 0.95, resamples: int = 10000, seed: int = 0
) -> Interval:
    """Compute the worst-group accuracy with a bootstrap interval.

    The minimum of noisy accuracies is biased downwards, and in the resamples once more: the interval extends further
    down than up.

    Args:
        correct: bool [N], whether each image is predicted rightly.
        groups: int64 [N] ≥ 0. Ids without images are ignored.
        level: confidence level, in (0,1).
        resamples: number of bootstrap resamples.
        seed: seed of the resamples.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> import torch
        >>> from debiaskd.metrics import worst_group_interval
        >>> correct = torch.tensor([True] * 90 + [False] * 10 + [True] * 6 + [False] * 4)
        >>> found = worst_group_interval(correct, torch.tensor([0] * 100 + [1] * 10))
        >>> found.value, found.low, found.high, found.smallest
        (0.6, 0.3, 0.9, 10)
    """
    tables = _tables(groups, correct)
    _options(level, resamples)
    counts = np.array([len(of_group) for of_group in tables])
    right = np.array([of_group.sum() for of_group in tables])
    random = np.random.default_rng(seed)
    drawn = random.binomial(counts, right / counts, size=(resamples, len(counts))) / counts
    return _interval((right / counts).min(), drawn.min(1), level, counts)


def paired_difference(
    first: Tensor,
    second: Tensor,
    groups: Tensor,
    *,
    level: float = 0.95,
    resamples: int = 10000,
    seed: int = 0,
) -> Interval:
    """Compute the difference of two worst-group accuracies on the same images, with a paired bootstrap.

    The value is that of `first` minus that of `second`. Images that both methods classify correctly, or both
    incorrectly, do not widen the interval within a group, so that a difference can be certain although neither accuracy
    is. If the interval lies above 0, the first method is better at this confidence level.

    Of several trained models of a method (seeds), the mean of their worst-group accuracies is compared. The models are
    held fixed, and the images are drawn: the interval says nothing of what another seed would give.

    Args:
        first, second: bool [N], whether each method predicts each image correctly; or [S,N] of S models, S may differ.
        groups, level, resamples, seed: as `worst_group_interval`.

    Example:
        >>> import torch
        >>> from debiaskd.metrics import paired_difference
        >>> second = torch.tensor([True] * 60 + [False] * 40)
        >>> first = torch.tensor([True] * 70 + [False] * 30)
        >>> found = paired_difference(first, second, torch.zeros(100, dtype=torch.int64))
        >>> round(found.value, 2), found.low > 0
        (0.1, True)
    """
    models = []
    for name, correct in (("first", first), ("second", second)):
        rows = checks.tensor(name, correct)
        rows = rows[None] if rows.dim() == 1 else rows
        checks.rank(name, rows, "[S,N]")
        if not len(rows):
            raise ValueError(f"{name} must be of one model or more, got none")
        models.append(rows)
    checks.shape("second", models[1][0], "[N]", [models[0].shape[1]])
    tables = _tables(groups, *models[0], *models[1])
    _options(level, resamples)
    counts = np.array([len(of_group) for of_group in tables])
    random = np.random.default_rng(seed)
    drawn, values = [], []
    for of_group in tables:
        # Images that the same models get right are alike: a resample is a multinomial draw of such kinds.
        kinds, images = np.unique(of_group, axis=0, return_counts=True)
        shares = random.multinomial(len(of_group), images / len(of_group), size=resamples) / len(of_group)
        drawn.append(shares @ kinds)
        values.append(of_group.mean(0))

    def difference(worst: NDArray[np.float64]) -> NDArray[np.float64]:
        apart: NDArray[np.float64] = worst[..., : len(models[0])].mean(-1) - worst[..., len(models[0]) :].mean(-1)
        return apart

    return _interval(float(difference(np.array(values).min(0))), difference(np.stack(drawn).min(0)), level, counts)


def _tables(groups: Tensor, *correct: Tensor) -> list[NDArray[np.int64]]:
    """Of each group that occurs [n] or, of several methods, [n,methods]: 1 where right."""
    for each in correct:
        check_correct(each)
    check_groups("groups", groups)
    checks.shape("groups", groups, "[N]", [len(correct[0])])
    joined = torch.stack([each.cpu() for each in correct], -1).long()
    joined = joined[:, 0] if len(correct) == 1 else joined
    return [joined[groups.cpu() == group].numpy() for group in groups.unique().tolist()]


def _options(level: float, resamples: int) -> None:
    if not 0 < checks.number("level", level) < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    if checks.integer("resamples", resamples) < 1:
        raise ValueError(f"resamples must be >= 1, got {resamples}")


def _interval(value: float, drawn: NDArray[np.float64], level: float, counts: NDArray[np.int64]) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high), int(counts.min()))
