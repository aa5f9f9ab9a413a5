"""How the part of a map that lies above a threshold overlaps with the boxes, counted in pixels.

Formula, with the positive part a+ of a map a [H,W], the union M of its image's boxes and masks, and J, the pixels that
are judged (all of them; or those of M and all that lie in no ignored area):

    B = { p in J : (a+_p - min_J a+) / (max_J a+ - min_J a+) > threshold }
    intersection = |B and M|,  union = |B or M|

B is all of J where a+ is one positive value, and empty where it is 0. There is no gradient: nothing changes with a map
that changes a little. A map smaller than `size` is upsampled bilinearly (align_corners=False) inside the op.

Source: Rao et al. 2023, "Studying How to Efficiently and Effectively Guide Models with Explanations",
arXiv 2303.11932.

Bytes that must move: the map, read once, for any number of thresholds. The range of a map has to be known before its
first pixel is judged, so that `cpp` goes through each map twice, the second time in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.boxes import Boxes
from debiaskd.ops.backend import choose, kernels, register_fake
from debiaskd.ops.ignore import left_out
from debiaskd.utils import checks


def box_overlap(
    attribution: Tensor,
    boxes: Boxes,
    thresholds: Sequence[float],
    *,
    size: tuple[int, int] | None = None,
    ignore: Boxes | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels in the intersection and in the union of the boxes with where the map, brought to [0,1], is high.

    Args:
        attribution: [N,H,W], raw; any floating dtype, any strides. Computed in float32 for half precisions.
        boxes: of N images, in pixels of `size`.
        thresholds: T numbers in [0,1).
        size: (height, width) that the boxes refer to and that the map is upsampled to; None: the map's own.
        ignore: of N images, areas whose pixels, outside of the boxes, are left out; None: no such areas.

    Returns:
        intersection int64 [N,T], union int64 [N,T], and defined bool [N]: False where a map holds NaN or infinity
        (among what is judged) or where the image is not annotated, for which both counts are 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> attribution = torch.tensor([[[4.0, 3.0], [1.0, -9.0]]])
        >>> box_overlap(attribution, Boxes.from_lists([[[0, 0, 1, 2]]]), [0.5, 0.9])
        (tensor([[1, 1]]), tensor([[3, 2]]), tensor([True]))

    Source: Rao et al. 2023, arXiv 2303.11932.
    """
    height, width = check_maps(attribution, boxes, size, ignore)
    values = check_thresholds("thresholds", thresholds)
    attribution = attribution.detach()
    backend = choose("box_overlap", attribution)
    if backend == "eager":
        return eager(attribution, boxes, values, (height, width), ignore)
    size = (height, width)
    areas = (None, None, None, None) if ignore is None else _packed(ignore, size)
    found: tuple[Tensor, Tensor, Tensor] = kernels(backend).box_overlap(
        attribution, *_packed(boxes, size), *areas, values, height, width
    )
    return found


def _packed(boxes: Boxes, size: tuple[int, int]) -> tuple[Tensor | None, ...]:
    return boxes.coords, boxes.offsets, boxes.annotated, boxes.mask_words(size)


def eager(
    attribution: Tensor, boxes: Boxes, thresholds: Sequence[float], size: tuple[int, int], ignore: Boxes | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The oracle: the formula as it stands, in PyTorch. A few maps at a time, so that memory does not grow with N."""
    shape = (len(boxes), len(thresholds))
    both, either = (torch.zeros(shape, dtype=torch.int64, device=attribution.device) for _ in range(2))
    defined = boxes.annotated.clone()
    for part in parts(len(boxes), maps_at_once(attribution, size)):
        maps, mask = upsampled(attribution[part], size), boxes[part].mask(size)
        judged = torch.ones_like(mask) if ignore is None else ~left_out(boxes[part], ignore[part], size)
        low = torch.where(judged, maps, torch.inf).amin((1, 2), keepdim=True).clamp(min=0)
        high = torch.where(judged, maps, 0).amax((1, 2), keepdim=True).clamp(min=0)  # NaN stays NaN
        defined[part] &= high[:, 0, 0].isfinite()
        positive = maps.clamp(min=0)
        share = torch.where(high > low, (positive - low) / (high - low), positive.sign())
        for column, threshold in enumerate(thresholds):
            above = (share > threshold) & judged
            both[part, column] = (above & mask).sum((1, 2))
            either[part, column] = (above | mask).sum((1, 2))
    return both * defined[:, None], either * defined[:, None], defined


@register_fake("box_overlap")
def _(
    attribution: Tensor,
    coords: Tensor,
    offsets: Tensor,
    annotated: Tensor,
    mask: Tensor | None,
    ignore_coords: Tensor | None,
    ignore_offsets: Tensor | None,
    ignore_annotated: Tensor | None,
    ignore_mask: Tensor | None,
    thresholds: Sequence[float],
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    counts = [attribution.new_empty((attribution.shape[0], len(thresholds)), dtype=torch.int64) for _ in range(2)]
    return counts[0], counts[1], attribution.new_empty((attribution.shape[0],), dtype=torch.bool)


# ---- what the metrics of attribution maps have in common ----


def upsampled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[N,H,W] in float32 or wider, at `size`."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if tuple(maps.shape[1:]) == size:
        return maps
    if not len(maps):
        return maps.reshape(0, *size)  # nothing, which interpolate refuses
    large = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    first = maps[:, :1, :1]
    constant = (maps == first).all(2, keepdim=True).all(1, keepdim=True)
    return torch.where(constant, first, large)  # of one value interpolation makes several that differ by rounding


def maps_at_once(attribution: Tensor, size: tuple[int, int]) -> int:
    """As many as a CPU's cache holds between two passes, or as keep a GPU busy."""
    pixels = 1 << 20 if attribution.device.type == "cpu" else 1 << 25
    return max(1, pixels // (size[0] * size[1]))


def parts(count: int, at_once: int) -> Iterator[slice]:
    return (slice(begin, min(begin + at_once, count)) for begin in range(0, count, at_once))


def check_maps(
    attribution: Tensor, boxes: Boxes, size: tuple[int, int] | None, ignore: Boxes | None = None
) -> tuple[int, int]:
    """Maps and what belongs to them; returns the size that boxes refer to."""
    checks.rank("attribution", checks.floating("attribution", attribution), "[N,H,W]")
    for name, given in (("boxes", boxes), ("ignore", boxes if ignore is None else ignore)):
        if len(check_boxes(name, given)) != len(attribution):
            raise ValueError(f"{name} must be of N={len(attribution)} images, got {len(given)}")
        checks.same_device(name, given.coords, "attribution", attribution)
    if not attribution.shape[1] * attribution.shape[2]:
        raise ValueError(f"attribution must have at least one pixel a map, got {list(attribution.shape)}")
    return (attribution.shape[1], attribution.shape[2]) if size is None else checks.size("size", size)


def check_boxes(name: str, boxes: object) -> Boxes:
    if not isinstance(boxes, Boxes):
        raise TypeError(f"{name} must be debiaskd.Boxes, got {type(boxes).__name__}")
    return boxes


def check_thresholds(name: str, thresholds: Sequence[float]) -> tuple[float, ...]:
    values = tuple(checks.number(f"{name}[{i}]", t) for i, t in enumerate(checks.sequence(name, thresholds)))
    if not values or not all(0 <= value < 1 for value in values):
        raise ValueError(f"{name} must lie in [0,1), got {list(values)}")
    return values
