"""The losses of single samples, each by its weight, to what `reduction` asks for."""

from __future__ import annotations

import torch
from torch import Tensor


def by_weight(each: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Losses [N] to their mean, divided by the sum of weights, their sum, or for "none" to [N].

    Args:
        each: [N].
        weight: [N]; 1 each without it. A mean of samples that all weigh 0 is 0.
        reduction: "mean", "sum" or "none".
    """
    weight = torch.ones_like(each) if weight is None else weight.to(each.dtype)
    weighted = weight * each
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    total = weight.sum()
    return weighted.sum() / torch.where(total > 0, total, 1)
