"""Masks for tests, and the boxes that cover the same pixels."""

from __future__ import annotations

import torch

import debiaskd as dk


def blobs(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """bool [count,H,W]: pixels in runs of any length, the first mask empty and the last one full."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(count, height, width, generator=generator) < 0.3
    mask = mask | (torch.rand(count, height, 1, generator=generator) < 0.2)
    if count > 1:
        mask[0], mask[-1] = False, True
    return mask


def runs(mask: torch.Tensor) -> list[list[int]]:
    """Boxes one pixel high that cover exactly the pixels of bool [H,W]."""
    found = []
    for y, row in enumerate(mask.tolist()):
        start = None
        for x, inside in enumerate([*row, False]):
            if inside and start is None:
                start = x
            elif not inside and start is not None:
                found.append([start, y, x, y + 1])
                start = None
    return found


def as_boxes(masks: torch.Tensor, boxes: list[list[list[int]] | None]) -> dk.Boxes:
    """The given boxes, and besides them the pixels of bool [N,H,W]."""
    return dk.Boxes.from_lists([None if b is None else [*b, *runs(m)] for m, b in zip(masks, boxes)])
