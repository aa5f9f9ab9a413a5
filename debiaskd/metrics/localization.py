"""Localization metrics of attribution maps: energy pointing game, IoU with boxes, and box coverage.

For a map `a` [H,W], its positive part `a⁺`, and the union `M` of its image's boxes and masks:

    EPG       sum(M a⁺) / sum(a⁺)
    IoU       |B ∩ M| / |B ∪ M|     B = { (a⁺ - min a⁺) / (max a⁺ - min a⁺) > threshold }
    coverage  |M| / HW

EPG and coverage use one fused op, `1 - energy`, which reads a map once and makes no mask: for EPG the map itself, for
the coverage a constant map. The IoU has its own op, `box_overlap`.

Pixels of ignored areas I outside M count neither as inside nor as outside: their sum, which is that over the union of I
and M minus that over M, is subtracted from sum(a⁺).

Sources: Wang et al. 2020, "Score-CAM"; Rao et al. 2023, arXiv 2303.11932.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from debiaskd.boxes import Boxes
from debiaskd.ops.box_overlap import box_overlap, check_boxes, check_maps, check_thresholds, maps_at_once, upsampled
from debiaskd.ops.ignore import known_areas, left_out
from debiaskd.ops.localization import energy_loss
from debiaskd.utils import checks

#: The op does not divide by a sum below this, so that a share this small does not tell what the map holds.
DOUBTFUL = 1e-7
#: Shares are of float32 accuracy relative to a map's whole energy. Where ignored areas leave less of it than this, they
#: are looked at again without it.
LITTLE = 0.1
#: Counts of 0/1 pixels and their shares are exact in float32 up to here.
EXACT_PIXELS = 1 << 22


def energy_in_box(
    attribution: Tensor, boxes: Boxes, size: tuple[int, int] | None = None, ignore: Boxes | None = None
) -> Tensor:
    """Compute the energy pointing game `Σ M a⁺ / Σ a⁺` of each map (Wang et al. 2020, Score-CAM; Rao et al. 2023).

    `a⁺` is the positive part of the map after bilinear upsampling (align_corners=False), `M` the union of its boxes.

    Args:
        attribution: [N,H,W], raw; any floating dtype, any strides.
        boxes: of N images, in pixels of `size`.
        size: (height, width) of the images; None: the map's own.
        ignore: of N images, areas (crowds, for one) whose pixels count neither as inside nor as outside, unless they
            lie in one of the boxes too; None: no such areas, as for an image that `ignore` says is not annotated.

    Returns:
        float32 [N] in [0,1]; 0 if a map has no positive value, NaN if it contains NaN or the image is not annotated.

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
    return energy_pointing_game(attribution, boxes, size, ignore)[0]


def energy_pointing_game(
    attribution: Tensor, boxes: Boxes, size: tuple[int, int] | None = None, ignore: Boxes | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `energy_in_box`, and for which maps it is defined.

    It is undefined for a map without a positive value, or of an image that is not annotated. A map wholly outside the
    boxes has the defined value 0.

    Args:
        attribution, boxes, size, ignore: as for `energy_in_box`.

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
    size = check_maps(attribution, boxes, size, ignore)
    attribution = attribution.detach()
    share = _share(attribution, boxes, size).float()
    doubtful = share < DOUBTFUL
    if ignore is not None:
        ignore = known_areas(ignore)
        judged = 1 - _share(attribution, _together(boxes, ignore), size).float() + share
        share = (share / judged).clamp(max=1)
        doubtful = ~(share >= DOUBTFUL) | ~(judged >= LITTLE)  # NaN may lie in an ignored area alone
    defined = boxes.annotated.clone()
    for rows in (doubtful & defined).nonzero()[:, 0].split(maps_at_once(attribution, size)):
        maps = _wide(upsampled(attribution[rows], size), size)
        if ignore is not None:
            maps = maps.masked_fill(left_out(boxes[rows], ignore[rows], size), 0)
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
    ignore: Boxes | None = None,
) -> Tensor:
    """Compute the IoU of the boxes with the region where the map, scaled to [0,1], is above a threshold.

    The positive part after bilinear upsampling (align_corners=False) is scaled to [0,1] by its smallest and largest
    value. A constant positive map becomes 1 everywhere, a map without a positive value 0 everywhere.

    Args:
        attribution: [N,H,W], raw; any floating dtype, any strides.
        boxes: of N images, in pixels of `size`.
        threshold: in [0,1), or several, which are cheaper together.
        size: (height, width) of the images; None: the map's own.
        ignore: as for `energy_in_box`; its pixels are in neither set and are not used for the smallest and largest
            value.

    Returns:
        float32 [N], or [N,T] for T thresholds, in [0,1]; 0 if both sets are empty, NaN if a map contains NaN or
        infinity or the image is not annotated.

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
    size = check_maps(attribution, boxes, size, ignore)
    thresholds = check_thresholds("threshold", [threshold] if isinstance(threshold, (int, float)) else threshold)
    both, either, defined = box_overlap(attribution, boxes, thresholds, size=size, ignore=ignore)
    found = torch.where(defined[:, None], both.double() / either.clamp(min=1), math.nan).float()
    return found[:, 0] if isinstance(threshold, (int, float)) else found


def box_coverage(boxes: Boxes, size: tuple[int, int]) -> Tensor:
    """Compute the fraction of each image that its boxes cover together.

    Args:
        boxes: of N images, in pixels of `size`.
        size: (height, width) of the images.

    Returns:
        float64 [N] in [0,1]; NaN if the image is not annotated.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Example:
        >>> from debiaskd import Boxes
        >>> from debiaskd.metrics import box_coverage
        >>> box_coverage(Boxes.from_lists([[[0, 0, 2, 4], [1, 0, 3, 4]], []]), (4, 4)).tolist()
        [0.75, 0.0]
    """
    check_boxes("boxes", boxes)
    height, width = checks.size("size", size)
    return _area(boxes, (height, width)) / (height * width)


def box_size_bins(boxes: Boxes, size: tuple[int, int], edges: Sequence[float]) -> Tensor:
    """Assign images to bins by the coverage of their boxes: bin `k` is `edges[k-1] <= coverage < edges[k]`.

    Args:
        boxes: of N images, in pixels of `size`.
        size: (height, width) of the images.
        edges: K increasing fractions of the image between 0 and 1, both excluded, for K + 1 bins.

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


def _together(boxes: Boxes, areas: Boxes) -> Boxes:
    """The boxes of both, image by image; annotated as the first."""
    order = torch.cat([boxes.image_ids(), areas.image_ids()]).argsort(stable=True)
    coords = torch.cat([boxes.coords, areas.coords])[order]
    known = [b.masks for b in (boxes, areas) if b.masks is not None]
    masks = known[0].either(known[1] if len(known) > 1 else None) if known else None
    return Boxes(coords, boxes.offsets + areas.offsets, annotated=boxes.annotated, masks=masks)


def _wide(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return maps.to(torch.promote_types(maps.dtype, _exact(size[0] * size[1])))


def _exact(pixels: int) -> torch.dtype:
    return torch.float32 if pixels <= EXACT_PIXELS else torch.float64
