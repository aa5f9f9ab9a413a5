"""How much of an attribution map lies on the object: energy pointing game, IoU, and how large the object's boxes are.

With a map `a` [H,W], its positive part `a⁺`, and the union `M` of its image's boxes:

    EPG       sum(M a⁺) / sum(a⁺)
    IoU       |B ∩ M| / |B ∪ M|     B = { (a⁺ - min a⁺) / (max a⁺ - min a⁺) > threshold }
    coverage  |M| / HW

Everything that needs M goes through one fused op, `1 - energy`, which reads a map once and never makes a mask: for EPG
the map itself, for IoU the 0/1 map B (whose energy in M is |B ∩ M| / |B|), for the coverage a constant map.

Sources: Wang et al. 2020, "Score-CAM"; Rao et al. 2023, arXiv 2303.11932.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd import checks
from debiaskd.boxes import Boxes
from debiaskd.ops.localization import energy_loss

#: The op does not divide by a sum below this, so that a share this small does not tell what the map holds.
DOUBTFUL = 1e-7
#: Counts of 0/1 pixels and their shares are exact in float32 up to here.
EXACT_PIXELS = 1 << 22


def energy_in_box(attribution: Tensor, boxes: Boxes, size: tuple[int, int] | None = None) -> Tensor:
    """The energy pointing game (Wang et al. 2020, Score-CAM; Rao et al. 2023): `Σ M a⁺ / Σ a⁺` for each map.

    `a⁺` is the positive part of the map after bilinear upsampling (align_corners=False), `M` the union of its boxes.

    Args:
        attribution: [N,H,W], raw; any floating dtype, any strides.
        boxes: of N images, in pixels of `size`.
        size: (height, width) of the images; None: the map's own.

    Returns:
        float32 [N] in [0,1]; 0 where a map has no positive value, NaN where it holds NaN or where the image is not
        annotated.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Example:
        >>> import torch
        >>> from debiaskd import Boxes
        >>> from debiaskd.metrics import energy_in_box
        >>> attribution = torch.tensor([[[3.0, 1.0], [-9.0, 0.0]]])
        >>> energy_in_box(attribution, Boxes.from_lists([[[0, 0, 1, 2]]]))
        tensor([0.7500])
    """
    return energy_pointing_game(attribution, boxes, size)[0]


def energy_pointing_game(
    attribution: Tensor, boxes: Boxes, size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """`energy_in_box`, and for which maps it is defined.

    A map without a positive value, or of an image that is not annotated, has no share: one that lies wholly outside of
    the boxes has the share 0.

    Args:
        attribution, boxes, size: as for `energy_in_box`.

    Returns:
        float32 [N] as `energy_in_box`, and bool [N].

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Example:
        >>> import torch
        >>> from debiaskd import Boxes
        >>> from debiaskd.metrics import energy_pointing_game
        >>> attribution = torch.tensor([[[0.0, 1.0]], [[-1.0, -1.0]]])
        >>> energy_pointing_game(attribution, Boxes.from_lists([[[0, 0, 1, 1]], [[0, 0, 1, 1]]]))
        (tensor([0., 0.]), tensor([ True, False]))
    """
    size = _check(attribution, boxes, size)
    attribution = attribution.detach()
    share = _share(attribution, boxes, size).float()
    defined = boxes.annotated.clone()
    for rows in (share < DOUBTFUL).nonzero()[:, 0].split(_maps_at_once(attribution, size)):
        maps = _resized(attribution[rows], size)
        largest = maps.amax((1, 2))
        positive = ~(largest <= 0)  # NaN is shown, not taken for nothing
        # The share does not change with a map's scale; only the sum that the op would not divide by does.
        scaled = maps / torch.where(positive, largest, 1)[:, None, None]
        share[rows] = torch.where(positive, _share(scaled, boxes[rows], size), 0).float()
        defined[rows] = positive
    return share, defined


def iou_with_boxes(
    attribution: Tensor,
    boxes: Boxes,
    threshold: float | Sequence[float] = 0.5,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Intersection over union of the boxes with where the map, brought to [0,1], is above a threshold.

    The positive part after bilinear upsampling (align_corners=False) is brought to [0,1] by its smallest and largest
    value. A map of one positive value becomes 1 everywhere, a map without a positive value 0 everywhere.

    Args:
        attribution: [N,H,W], raw; any floating dtype, any strides.
        boxes: of N images, in pixels of `size`.
        threshold: in [0,1), or several, which cost less together.
        size: (height, width) of the images; None: the map's own.

    Returns:
        float32 [N], or [N,T] for T thresholds, in [0,1]; 0 where both sets are empty, NaN where a map holds NaN or
        infinity or where the image is not annotated.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Source: Rao et al. 2023, arXiv 2303.11932, whose public code fixes the threshold 0.5.

    Example:
        >>> import torch
        >>> from debiaskd import Boxes
        >>> from debiaskd.metrics import iou_with_boxes
        >>> attribution = torch.tensor([[[4.0, 3.0], [1.0, -9.0]]])
        >>> iou_with_boxes(attribution, Boxes.from_lists([[[0, 0, 1, 2]]]), [0.5, 0.9])
        tensor([[0.3333, 0.5000]])
    """
    size = _check(attribution, boxes, size)
    thresholds = check_thresholds("threshold", [threshold] if isinstance(threshold, (int, float)) else threshold)
    attribution = attribution.detach()
    found = attribution.new_empty(len(boxes), len(thresholds), dtype=torch.float32)
    area, at_once = _area(boxes, size), _maps_at_once(attribution, size)
    buffer = _resized(attribution[:0], size).new_empty(min(at_once, len(boxes)), *size)
    for part in _parts(len(boxes), at_once):
        maps, own = _resized(attribution[part], size), boxes[part]
        limits, finite = _limits(maps, thresholds)
        above = buffer[: len(maps)]
        for column, limit in enumerate(limits.unbind(1)):
            torch.gt(maps, limit[:, None, None], out=above)
            count = above.sum((1, 2)).double()
            both = (_share(above, own, size).double() * count).round()
            union = count + area[part] - both
            iou = both / torch.where(union > 0, union, 1)
            found[part, column] = torch.where(finite, iou, math.nan).float()  # not annotated: the share is NaN
    return found[:, 0] if isinstance(threshold, (int, float)) else found


def box_coverage(boxes: Boxes, size: tuple[int, int]) -> Tensor:
    """The fraction of each image that its boxes cover together.

    Args:
        boxes: of N images, in pixels of `size`.
        size: (height, width) of the images.

    Returns:
        float64 [N] in [0,1]; NaN where the image is not annotated.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Example:
        >>> from debiaskd import Boxes
        >>> from debiaskd.metrics import box_coverage
        >>> box_coverage(Boxes.from_lists([[[0, 0, 2, 4], [1, 0, 3, 4]], []]), (4, 4)).tolist()
        [0.75, 0.0]
    """
    _check_boxes(boxes)
    height, width = checks.size("size", size)
    return _area(boxes, (height, width)) / (height * width)


def box_size_bins(boxes: Boxes, size: tuple[int, int], edges: Sequence[float]) -> Tensor:
    """Which images have small boxes, and which large ones: bin `k` is `edges[k-1] <= coverage < edges[k]`.

    Args:
        boxes: of N images, in pixels of `size`.
        size: (height, width) of the images.
        edges: K rising fractions of the image between 0 and 1, both excluded; they make K + 1 bins.

    Returns:
        int64 [N] in [0,K]; -1 for an image without a covered pixel or one that is not annotated.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Example:
        >>> from debiaskd import Boxes
        >>> from debiaskd.metrics import box_size_bins
        >>> box_size_bins(Boxes.from_lists([[[0, 0, 1, 1]], [[0, 0, 4, 2]], []]), (4, 4), [0.25, 0.5]).tolist()
        [0, 2, -1]
    """
    limits = check_edges("edges", edges)
    coverage = box_coverage(boxes, size)
    found = torch.bucketize(coverage, torch.tensor(limits, dtype=torch.float64, device=coverage.device), right=True)
    return torch.where(coverage > 0, found, -1)


def check_edges(name: str, edges: Sequence[float]) -> tuple[float, ...]:
    values = tuple(checks.number(f"{name}[{i}]", edge) for i, edge in enumerate(checks.sequence(name, edges)))
    rising = all(low < high for low, high in zip((0.0, *values), (*values, 1.0)))
    if not values or not rising:
        raise ValueError(f"{name} must be rising fractions between 0 and 1, at least one, got {list(values)}")
    return values


def check_thresholds(name: str, thresholds: Sequence[float]) -> tuple[float, ...]:
    values = tuple(checks.number(f"{name}[{i}]", t) for i, t in enumerate(checks.sequence(name, thresholds)))
    if not values or not all(0 <= value < 1 for value in values):
        raise ValueError(f"{name} must lie in [0,1), got {list(values)}")
    return values


def _share(maps: Tensor, boxes: Boxes, size: tuple[int, int]) -> Tensor:
    """Of each map's positive part, in the boxes; NaN where nobody knows where the boxes are."""
    if not len(boxes):
        return maps.new_empty(0, dtype=torch.float32)
    share = 1 - energy_loss(maps, boxes, size=size, reduction="none")
    return torch.where(boxes.annotated, share, math.nan)


def _area(boxes: Boxes, size: tuple[int, int]) -> Tensor:
    """float64 [N]: pixels covered."""
    pixels = size[0] * size[1]
    constant = torch.ones(1, size[1], dtype=_exact(pixels), device=boxes.device).expand(len(boxes), *size)
    return (_share(constant, boxes, size).double() * pixels).round()


def _limits(maps: Tensor, thresholds: Sequence[float]) -> tuple[Tensor, Tensor]:
    """[N,T]: what a pixel must exceed to exceed each threshold once normalised; and which maps are finite.

    Normalising each pixel takes three passes over the map. Rounding included, it never turns the order of two pixels
    around, so that there is a largest number that stays at or below the threshold: among the few around
    `smallest + threshold * spread`, which rounding misses by less than these.
    """
    smallest, largest = maps.amin((1, 2)).clamp(min=0)[:, None], maps.amax((1, 2)).clamp(min=0)[:, None]
    spread = largest - smallest
    wanted = torch.tensor(thresholds, dtype=maps.dtype, device=maps.device)
    as_integers = torch.int64 if maps.dtype == torch.float64 else torch.int32  # of positive floats, in the same order
    nearby = torch.arange(-4, 5, dtype=as_integers, device=maps.device)
    about = (smallest + wanted * spread).contiguous().view(as_integers)
    candidates = (about[..., None] + nearby).clamp(min=0).view(maps.dtype)
    stays = (candidates - smallest[..., None]) / spread[..., None] <= wanted[:, None]
    last = (stays.sum(-1, keepdim=True) - 1).clamp(min=0)
    limits = candidates.gather(-1, last)[..., 0]
    return torch.where(spread > 0, limits, 0), largest[:, 0].isfinite()  # 0: all of a positive map, nothing of another


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    pixels = size[0] * size[1]
    maps = maps.to(torch.promote_types(maps.dtype, _exact(pixels)))
    if tuple(maps.shape[1:]) != size and len(maps):
        maps = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return maps


def _exact(pixels: int) -> torch.dtype:
    return torch.float32 if pixels <= EXACT_PIXELS else torch.float64


def _maps_at_once(attribution: Tensor, size: tuple[int, int]) -> int:
    """As many as a CPU's cache holds between two passes, or as keep a GPU busy."""
    pixels = 1 << 20 if attribution.device.type == "cpu" else 1 << 25
    return max(1, pixels // (size[0] * size[1]))


def _parts(count: int, at_once: int) -> Iterator[slice]:
    return (slice(begin, min(begin + at_once, count)) for begin in range(0, count, at_once))


def _check(attribution: Tensor, boxes: Boxes, size: tuple[int, int] | None) -> tuple[int, int]:
    checks.rank("attribution", checks.floating("attribution", attribution), "[N,H,W]")
    _check_boxes(boxes)
    if len(boxes) != len(attribution):
        raise ValueError(f"boxes must be of N={len(attribution)} images, got {len(boxes)}")
    checks.same_device("boxes", boxes.coords, "attribution", attribution)
    if not attribution.shape[1] * attribution.shape[2]:
        raise ValueError(f"attribution must have at least one pixel a map, got {list(attribution.shape)}")
    return (attribution.shape[1], attribution.shape[2]) if size is None else checks.size("size", size)


def _check_boxes(boxes: Boxes) -> None:
    if not isinstance(boxes, Boxes):
        raise TypeError(f"boxes must be debiaskd.Boxes, got {type(boxes).__name__}")
