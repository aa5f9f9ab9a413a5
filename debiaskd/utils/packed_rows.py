"""Rows of several images packed one after the other: `rows[offsets[i]:offsets[i + 1]]` are those of image `i`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from debiaskd.utils import checks

INT32 = torch.iinfo(torch.int32)


def image_ids(offsets: Tensor, count: int) -> Tensor:
    """int64 [count]: which image each row belongs to, without synchronisation."""
    images = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(images, offsets.diff(), output_size=count)


def rows_of_images(offsets: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The offsets and the rows, int64, of these images, int64 [n]."""
    counts = offsets.diff()[chosen]
    made = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    rows = torch.arange(int(made[-1]), device=offsets.device)
    return made, rows + torch.repeat_interleave(offsets[:-1][chosen] - made[:-1], counts)


def as_box_rows(name: str, boxes: Any) -> Tensor:
    """int32 [k,4] of anything that holds k rows of whole numbers; None: no rows."""
    if boxes is None:
        return torch.zeros(0, 4, dtype=torch.int32)
    rows = checks.convertible(name, boxes, "rows of four numbers")
    if rows.numel() == 0 and rows.dim() <= 2:
        return torch.zeros(0, 4, dtype=torch.int32)
    if rows.dim() != 2 or rows.shape[1] != 4:
        raise ValueError(f"{name} must have shape [k,4], got {list(rows.shape)}")
    if rows.dtype.is_complex or rows.dtype == torch.bool:
        raise TypeError(f"{name} must hold numbers, got {rows.dtype}")
    wide = rows.double()  # NaN fails both comparisons
    if not bool(((wide == wide.round()) & (wide >= INT32.min) & (wide <= INT32.max)).all()):
        raise ValueError(f"{name} must hold whole numbers of pixels that fit into int32, got {rows.tolist()}")
    return rows.to(torch.int32)


def as_labels(name: str, labels: Any, count: int) -> Tensor:
    """int64 [count] of a sequence of integers; None: no labels."""
    values = checks.convertible(name, [] if labels is None else labels, "one class a box")
    if values.dim() != 1 or len(values) != count:
        raise ValueError(f"{name} must have one class a box, {count}, got {list(values.shape)}")
    if count and not checks.is_integer(values.dtype):
        raise TypeError(f"{name} must hold integers, got {values.dtype}")
    return values.to(torch.int64)


def as_image_ids(index: int | slice | Sequence[int] | Tensor, count: int, device: torch.device) -> Tensor:
    """int64 [n]: the images that an index of any kind selects among `count`."""
    if isinstance(index, slice):
        return torch.arange(count, device=device)[index]
    if isinstance(index, int):
        if not -count <= index < count:
            raise IndexError(f"image {index} is out of range for boxes of {count} images")
        return torch.tensor([index % count], device=device)
    ids = checks.convertible("index", index, "an integer, a slice, integers or bool [N]").to(device)
    if ids.dtype == torch.bool:
        checks.shape("index", ids, "[N]", [count])
        return ids.nonzero()[:, 0]
    if ids.dim() > 1 or (ids.numel() and not checks.is_integer(ids.dtype)):
        raise TypeError(f"index must hold integers or be bool [N], got {ids.dtype} {list(ids.shape)}")
    return ids.reshape(-1).long()
