"""IoU of maps with boxes: what must move is the map once, for any number of thresholds.

There is no gradient to be timed, so that `bench.metrics` runs these cases, beside those of the energy pointing game.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from debiaskd.boxes import Boxes
from debiaskd.metrics import iou_with_boxes

GRID = tuple(step / 20 for step in range(1, 20))
#: Times as fast as the loop, at least.
GOALS = {"IoU 5000×224×224, 3 boxes": 10.0}


def cases(maps: Tensor, boxes: Boxes, size: tuple[int, int] | None, shape: str) -> Iterator[tuple[str, Any, Any]]:
    """Name, what is timed, and what the loop is to do with each map (None: it is timed alone)."""
    ours = partial(iou_with_boxes, maps, boxes, size=size)
    yield f"IoU {shape}", partial(ours, 0.5), partial(iou_of_one, threshold=0.5)
    if size is None:  # the loop takes as many times as long as there are thresholds
        yield f"IoU at {len(GRID)} thresholds {shape}", partial(ours, GRID), None


def iou_of_one(positive: Tensor, mask: Tensor, box_pixels: int, threshold: float) -> Tensor:
    """As the public code does it for one map."""
    smallest, largest = positive.min(), positive.max()
    if largest > 0:
        positive = positive / largest if largest == smallest else (positive - smallest) / (largest - smallest)
    both = pixels((positive > threshold) & (mask == 1))
    union = pixels(positive > threshold) + box_pixels - both
    return torch.tensor(both / union if union else 0.0)


def pixels(chosen: Tensor) -> int:
    return len(torch.where(chosen)[0])
