"""Expected calibration error, over all images and by group."""

from __future__ import annotations

import torch
from torch import Tensor

from debiaskd.metrics.groups import check_correct, check_groups
from debiaskd.utils import checks


def calibration_error(confidence: Tensor, correct: Tensor, *, bins: int = 15) -> float:
    """Compute the expected calibration error (ECE) in [0,1], over bins of equal mass.

        Σ_b n_b / N · |mean of correct in b − mean of confidence in b|

    Bins have equal mass instead of equal width: most confidences are high, so that most bins of equal width would be
    nearly empty.

    Args:
        confidence: [N] in [0,1], the probability of the predicted class.
        correct: bool [N].
        bins: maximum number of bins; with fewer images, one for each image.

    Returns:
        The error as a float; NaN without images.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> import torch
        >>> from debiaskd.metrics import calibration_error
        >>> calibration_error(torch.full((10,), 0.75), torch.arange(10) < 5)
        0.25

    Source: Nixon et al. 2019, "Measuring Calibration in Deep Learning" (adaptive bins).
    """
    checks.rank("confidence", checks.floating("confidence", confidence), "[N]")
    if checks.tensor("correct", correct).dtype != torch.bool:
        raise TypeError(f"correct must be bool (prediction == label), got {correct.dtype}")
    checks.shape("correct", correct, "[N]", [len(confidence)])
    if checks.integer("bins", bins) < 1:
        raise ValueError(f"bins must be >= 1, got {bins}")
    sure = confidence.detach().double()
    if not len(sure):
        return float("nan")
    low, high = float(sure.min()), float(sure.max())
    if not (low >= 0 and high <= 1 + 1e-6):
        raise ValueError(f"confidence must lie in [0, 1], got values in [{low:g}, {high:g}]")
    # Images of equal confidence count as their mean, so that their order does not matter.
    _, place, count = sure.unique(return_inverse=True, return_counts=True)
    right = torch.zeros_like(count, dtype=torch.float64).index_add(0, place, correct.double()) / count
    order = sure.argsort(stable=True)
    gap = (right[place] - sure)[order]
    total = sum(abs(float(part.sum())) for part in gap.tensor_split(min(bins, len(gap))))
    return total / len(gap)


def group_calibration_error(confidence: Tensor, correct: Tensor, groups: Tensor, *, bins: int = 15) -> dict[int, float]:
    """Compute the `calibration_error` of each group that occurs, by group id.

    Args:
        confidence, correct, bins: as `calibration_error`.
        groups: int64 [N] ≥ 0.

    Example:
        >>> import torch
        >>> from debiaskd.metrics import group_calibration_error
        >>> correct, groups = torch.tensor([True, True, False, False]), torch.tensor([0, 0, 1, 1])
        >>> group_calibration_error(torch.ones(4), correct, groups)
        {0: 0.0, 1: 1.0}
    """
    check_correct(correct)
    check_groups("groups", groups)
    checks.shape("groups", groups, "[N]", [len(correct)])
    found = {}
    for group in groups.unique().tolist():
        of_group = groups == group
        found[group] = calibration_error(confidence[of_group], correct[of_group], bins=bins)
    return found
