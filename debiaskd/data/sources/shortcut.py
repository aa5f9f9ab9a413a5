"""Labels and backgrounds of data sets with a shortcut of chosen strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def deal(kinds: Sequence[Tensor], shares: Mapping[str, float]) -> dict[str, list[Tensor]]:
    """Cut each of `kinds` [m] between the splits, from its beginning on; no member gets into two.

    Args:
        kinds: members of each kind, in random order.
        shares: by split, of a sum of 1 at most.

    Returns:
        by split, what it gets of each kind.

    Example:
        >>> deal([torch.arange(4), torch.arange(10, 12)], {"train": 0.5, "test": 0.5})["test"]
        [tensor([2, 3]), tensor([11])]
    """
    pools, start = {}, 0.0
    for name, share in shares.items():
        pools[name] = [kind[round(start * len(kind)) : round((start + share) * len(kind))] for kind in kinds]
        start += share
    return pools


def draw(
    count: int, agreement: float, pool: Sequence[Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels 0 and 1, the backgrounds' kinds 0 and 1, and for each image one of its label's `pool`.

    Half of the images have either label. Within either one the share `agreement`, up to rounding, has the background
    of its own number. Members of the pools are drawn with replacement.

    Returns:
        labels, backgrounds and members, int64 [count].

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> labels, backgrounds, _ = draw(40, 0.95, [torch.arange(3), torch.arange(3, 9)], generator)
        >>> (2 * labels + backgrounds).bincount().tolist()
        [19, 1, 1, 19]
    """
    labels = (torch.arange(count) % 2)[torch.randperm(count, generator=generator)]
    backgrounds, members = labels.clone(), torch.empty_like(labels)
    for label in (0, 1):
        rows = (labels == label).nonzero()[:, 0]
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        backgrounds[shuffled[round(agreement * len(rows)) :]] = 1 - label
        members[rows] = pool[label][torch.randint(len(pool[label]), (len(rows),), generator=generator)]
    return labels, backgrounds, members
