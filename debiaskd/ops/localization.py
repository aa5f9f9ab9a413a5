"""Localization losses: an attribution map pulled into the object's boxes.

Formula, for one map a [H,W] and the union M of its image's boxes and mask (1 inside, 0 outside):

    energy  1 - sum(M a+) / sum(a+)     a+ = max(a, 0);  1 - sum(M a+) where sum(a+) < 1e-7
    l1      mean |a - M|
    ppce    mean over M of -log a       log clamped at -100; 0 without a box
    rrr     sum (1 - M) a^2

Gradient of energy, with E = sum(a+) and I = sum(M a+), where a > 0 and E >= 1e-7:

    dL/da = -(E - I) / E^2 inside,  I / E^2 outside

so that two numbers a map and one bit a pixel make up all of it. A map smaller than `size` is upsampled bilinearly
inside the op (align_corners=False); its gradient is the transposed interpolation.

Images that are not annotated contribute nothing. `mean` divides by the number of annotated images (0 without any),
`sum` adds up, `none` gives [N].

Source: Rao et al. 2023, "Studying How to Efficiently and Effectively Guide Models with Explanations",
arXiv 2303.11932.

Bytes that must move: the map read in forward, its gradient written in backward, and for energy 1/32 of the map in
bits, written and read. The other kinds read the map again in backward. What the boxes cost does not depend on
the size of the map; a mask is read in both passes, one bit a pixel; the upsampled map is never stored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.boxes import Boxes
from debiaskd.ops.backend import REDUCTION_NAMES, REDUCTIONS, choose, kernels, register_fake
from debiaskd.ops.ignore import left_out, without
from debiaskd.ops.masked import with_mask
from debiaskd.ops.once import differentiable_once, unrecorded
from debiaskd.utils import checks

KINDS = {"energy": 0, "l1": 1, "ppce": 2, "rrr": 3}


def localization_loss(
    attribution: Tensor,
    boxes: Boxes,
    *,
    kind: str = "energy",
    size: tuple[int, int] | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    ignore: Boxes | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """How far an attribution map is from lying inside the boxes.

    Args:
        attribution: [N,H,W] maps of one class each; any floating dtype, any strides.
        boxes: of the N images, in pixels of `size`; choose the class with `boxes.for_class(target)` first.
        kind: "energy", "l1", "ppce" or "rrr". energy takes raw maps; l1 and ppce expect maps in [0,1], rrr in
            [-1,1]: see `normalize`.
        size: (height, width) that the boxes refer to and that the map is upsampled to; the map's own by default.
        normalize: first do to the map what its kind expects, as published: keep positives (l1, ppce), then divide by
            the map's largest absolute value (l1, ppce, rrr). The gradient includes both. Nothing for energy.
        reduction: "mean" over annotated images, "sum" or "none".
        ignore: of the N images, areas (crowds, for one) whose pixels count neither as inside nor as outside, unless
            they lie in one of the boxes too; nor do they set the largest value. None: no such areas, as for an image
            that `ignore` says is not annotated. Where there are any, upsampled maps and masks are kept in memory.
        mask: bool [N,H,W] of `size`, joined to M, as are the masks that `boxes` may carry; None: none. `boxes` alone
            says which images are annotated.

    Returns:
        Scalar, or [N] for "none" (0 where an image is not annotated). float32 for half precisions, else the dtype of
        the map.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> boxes = Boxes.from_lists([[[0, 0, 2, 4]]])
        >>> localization_loss(torch.ones(1, 4, 4), boxes).item()
        0.5

    """
    height, width = _check(attribution, boxes, kind, size, normalize, reduction)
    boxes = with_mask(boxes, mask, (height, width))
    words = boxes.mask_words((height, width))
    if ignore is not None:
        _check_ignore(ignore, boxes)
        if ignore.objects:
            return _judged_loss(attribution, boxes, ignore, kind, (height, width), normalize, reduction)
    if normalize:
        attribution = normalize_attribution(attribution, kind)
    backend = choose("localization", attribution)
    if backend == "eager":
        return eager(attribution, boxes, kind, (height, width), reduction)
    packed = (boxes.coords, boxes.offsets, boxes.annotated, words)
    arguments = (attribution, *packed, KINDS[kind], height, width, REDUCTIONS[reduction])
    loss: Tensor
    if attribution.requires_grad and torch.is_grad_enabled():
        loss = _Localization.apply(backend, *arguments)
    else:
        loss, _, _ = kernels(backend).localization(*arguments, False)
    return loss


def _judged_loss(
    attribution: Tensor,
    boxes: Boxes,
    ignore: Boxes,
    kind: str,
    size: tuple[int, int],
    normalize: bool,
    reduction: str,
) -> Tensor:
    """A pixel of 0 that lies outside of the boxes adds nothing to any of the losses; l1's mean is over the others."""
    dropped = left_out(boxes, ignore, size)
    if normalize and kind in ("l1", "ppce"):
        attribution = attribution.relu()
    maps = without(attribution, dropped, largest_one=normalize and kind != "energy")
    if kind != "l1":
        return localization_loss(maps, boxes, kind=kind, reduction=reduction)
    judged = (~dropped).sum((1, 2)).clamp(min=1)
    each = localization_loss(maps, boxes, kind=kind, reduction="none") * (size[0] * size[1]) / judged
    return reduce(each, boxes, reduction)


def energy_loss(
    attribution: Tensor,
    boxes: Boxes,
    *,
    size: tuple[int, int] | None = None,
    reduction: str = "mean",
    ignore: Boxes | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`localization_loss` of kind "energy": the share of positive attribution that lies outside of the boxes."""
    return localization_loss(attribution, boxes, size=size, reduction=reduction, ignore=ignore, mask=mask)


def normalize_attribution(attribution: Tensor, kind: str) -> Tensor:
    """A raw map [N,H,W] as the loss of this kind expects it: positives only (l1, ppce), largest |a| = 1 (not energy).

    An all-zero map stays zero, with a zero gradient.
    """
    if kind == "energy":
        return attribution
    if kind in ("l1", "ppce"):
        attribution = attribution.relu()
    if attribution.numel() == 0:
        return attribution
    largest = attribution.abs().amax((1, 2), keepdim=True)
    return attribution / torch.where(largest > 0, largest, 1)


def eager(attribution: Tensor, boxes: Boxes, kind: str, size: tuple[int, int], reduction: str) -> Tensor:
    """The oracle: the formula as it stands, in PyTorch."""
    wide = torch.promote_types(attribution.dtype, torch.float32)
    maps = attribution.to(wide)
    if len(boxes) == 0:
        maps = maps.reshape(0, *size)  # nothing, which interpolate refuses
    elif tuple(maps.shape[1:]) != tuple(size):
        maps = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    mask = boxes.mask(size)
    return reduce(torch.where(boxes.annotated, _each(maps, mask, kind), 0), boxes, reduction)


def reduce(each: Tensor, boxes: Boxes, reduction: str) -> Tensor:
    """Losses [N], 0 where an image is not annotated, as asked."""
    if reduction == "none":
        return each
    if reduction == "sum":
        return each.sum()
    return each.sum() / boxes.annotated.sum().clamp(min=1)


def _each(maps: Tensor, mask: Tensor, kind: str) -> Tensor:
    inside = mask.to(maps.dtype)
    if kind == "energy":
        positive = maps.relu()  # clamp(min=0) has gradient 1 at 0 in some versions of PyTorch
        total, kept = positive.sum((1, 2)), (positive * inside).sum((1, 2))
        return 1 - kept / torch.where(total < 1e-7, 1, total)
    if kind == "l1":
        return (maps - inside).abs().mean((1, 2))
    if kind == "ppce":
        # 1 stands in, whose logarithm is 0 and whose gradient ends here: outside of the boxes, and where the clamped
        # logarithm is constant, since its own derivative, at 0, would turn a gradient of 0 into NaN.
        clamped = mask & (maps <= math.exp(-100))
        logs = torch.where(mask & ~clamped, maps, 1).log() - 100 * clamped
        return -logs.sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    return ((1 - inside) * maps.square()).sum((1, 2))


class _Localization(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        attribution: Tensor,
        coords: Tensor,
        offsets: Tensor,
        annotated: Tensor,
        mask: Tensor | None,
        kind: int,
        height: int,
        width: int,
        reduction: int,
    ) -> Tensor:
        loss, coefficients, positive = kernels(backend).localization(
            attribution, coords, offsets, annotated, mask, kind, height, width, reduction, True
        )
        # Energy at the map's own size is done with the map: its bits say the rest.
        map_size = attribution.shape[1:]
        by_bits = kind == KINDS["energy"] and map_size == (height, width)
        state = (coords, offsets, annotated, mask, coefficients, positive)
        ctx.save_for_backward(None if by_bits else attribution, *state)
        ctx.backend = backend
        ctx.options = (kind, height, width, map_size[0], map_size[1], attribution.dtype)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        with unrecorded():
            gradient = kernels(ctx.backend).localization_backward(grad_output, *ctx.saved_tensors, *ctx.options)
        return None, differentiable_once(gradient, "localization_loss"), *[None] * 8


@register_fake("localization")
def _(
    attribution: Tensor,
    coords: Tensor,
    offsets: Tensor,
    annotated: Tensor,
    mask: Tensor | None,
    kind: int,
    height: int,
    width: int,
    reduction: int,
    with_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    images = attribution.shape[0]
    wide = torch.promote_types(attribution.dtype, torch.float32)
    loss = attribution.new_empty((images,) if reduction == REDUCTIONS["none"] else (), dtype=wide)
    coefficients = attribution.new_empty((images if with_state else 0, 2), dtype=wide)
    by_bits = with_state and kind == KINDS["energy"] and attribution.shape[1:] == (height, width)
    words = (images, height, (width + 31) // 32) if by_bits else (0,)
    return loss, coefficients, attribution.new_empty(words, dtype=torch.int32)


@register_fake("localization_backward")
def _(
    grad_output: Tensor,
    attribution: Tensor | None,
    coords: Tensor,
    offsets: Tensor,
    annotated: Tensor,
    mask: Tensor | None,
    coefficients: Tensor,
    positive: Tensor,
    kind: int,
    height: int,
    width: int,
    map_height: int,
    map_width: int,
    dtype: torch.dtype,
) -> Tensor:
    return coefficients.new_empty((annotated.shape[0], map_height, map_width), dtype=dtype)


def _check(
    attribution: Tensor, boxes: Boxes, kind: str, size: tuple[int, int] | None, normalize: bool, reduction: str
) -> tuple[int, int]:
    checks.floating("attribution", attribution)
    checks.rank("attribution", attribution, "[N,H,W]")
    if not isinstance(boxes, Boxes):
        raise TypeError(f"boxes must be a dk.Boxes, got {type(boxes).__name__}")
    if len(boxes) != attribution.shape[0]:
        raise ValueError(f"boxes must be of N={attribution.shape[0]} images, as attribution is, got {len(boxes)}")
    checks.same_device("boxes", boxes.coords, "attribution", attribution)
    checks.option("kind", kind, tuple(KINDS))
    checks.flag("normalize", normalize)
    checks.option("reduction", reduction, REDUCTION_NAMES)
    if size is None:
        height, width = attribution.shape[1], attribution.shape[2]
    else:
        height, width = checks.size("size", size)
    if len(boxes) and (attribution.numel() == 0 or height < 1 or width < 1):
        raise ValueError(f"attribution must have at least one pixel a map, got {list(attribution.shape)}")
    return height, width


def _check_ignore(ignore: object, boxes: Boxes) -> None:
    if not isinstance(ignore, Boxes):
        raise TypeError(f"ignore must be a dk.Boxes, got {type(ignore).__name__}")
    if len(ignore) != len(boxes):
        raise ValueError(f"ignore must be of N={len(boxes)} images, as boxes are, got {len(ignore)}")
    checks.same_device("ignore", ignore.coords, "boxes", boxes.coords)
