"""The losses of localization maps, and two coefficients for the gradient of each, from the sums of its tiles."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .coverage import Boxes
from .launch import LARGE_TILES, launch
from .localization_tiles import ENERGY, L1, PPCE
from .map_tiles import Tiles
from .precision import add, divide
from .sums import MEAN, NONE, add_up

# Low enough in the interpreter for tests to exceed.
MOST_IMAGES = 64 if LARGE_TILES else 4096  # whose losses one program adds up
_TILE = 8 if LARGE_TILES else 1024  # sums that a program reads at once
_MOST_PARTS = 8 if LARGE_TILES else 64  # of a map among them
_COUNTED = tl.constexpr(1024)


@triton.jit
def _outcome(all, inside, tiles, KIND: tl.constexpr):
    """The losses of maps, and the two factors that with a pixel make up its gradient."""
    if KIND == ENERGY:
        tiny = all < 1e-7  # not divided by
        share = tl.where(tiny, inside, divide(inside, all))
        within = tl.where(tiny, -1, -divide(divide(all - inside, all), all))
        return 1 - share, within, tl.where(tiny, 0, divide(share, all))
    elif KIND == L1:
        share = divide(1 + tl.zeros_like(all), (tl.full([], 1, tl.int64) * tiles.height * tiles.width).to(all.dtype))
        return all * share, share, share
    elif KIND == PPCE:
        some = inside > 0
        share = tl.where(some, divide(tl.zeros_like(all) + 1, inside), 0)
        return tl.where(some, divide(all, inside), 0), -share, tl.zeros_like(all)
    else:
        return all, tl.zeros_like(all), tl.zeros_like(all) + 2


@triton.jit
def _count(annotated, images, dtype: tl.constexpr):
    result = tl.zeros([_COUNTED], dtype)
    for start in range(0, images, _COUNTED):
        i = start + tl.arange(0, _COUNTED).to(tl.int64)
        result += tl.load(annotated.data + i * annotated.stride, mask=i < images, other=0).to(dtype)
    return tl.sum(result, 0)


@triton.jit(do_not_specialize=("images", "steps"))
def _finish(
    partial,
    annotated,
    count,  # of annotated images; None where this program counts them
    loss,
    coefficients,  # None where nobody asked for them
    images,
    steps,
    parts,
    tiles,
    KIND: tl.constexpr,
    MEAN: tl.constexpr,
    EACH: tl.constexpr,
    IMAGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    dtype: tl.constexpr = partial.dtype.element_ty
    factor = tl.full([], 1, dtype)
    if MEAN:
        counted = _count(annotated, images, dtype) if count is None else tl.load(count)
        factor = tl.where(counted > 0, divide(factor, counted), 1)
    result = tl.zeros([IMAGES], dtype)
    lost = tl.zeros([IMAGES], dtype)
    for step in range(steps):
        image = (tl.program_id(0).to(tl.int64) * steps + step) * IMAGES + tl.arange(0, IMAGES)
        there = image < images
        counts = tl.load(annotated.data + image * annotated.stride, mask=there, other=0) != 0
        all = tl.zeros([IMAGES], dtype)
        inside = tl.zeros([IMAGES], dtype)
        all_lost = tl.zeros([IMAGES], dtype)
        inside_lost = tl.zeros([IMAGES], dtype)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            place = 2 * (image[:, None] * parts + part[None, :])
            mask = counts[:, None] & (part < parts)[None, :]
            first = tl.load(partial + place, mask=mask, other=0)
            second = tl.load(partial + (place + 1), mask=mask, other=0)
            all, all_lost = add(all, all_lost, tl.sum(first, 1))
            inside, inside_lost = add(inside, inside_lost, tl.sum(second, 1))
        each, within, beyond = _outcome(all, inside, tiles, KIND)
        each = tl.where(counts, each, 0) * factor
        if EACH:
            tl.store(loss + image, each, mask=there)
        else:
            result, lost = add(result, lost, each)
        if coefficients is not None:
            tl.store(coefficients + 2 * image, tl.where(counts, within * factor, 0), mask=there)
            tl.store(coefficients + (2 * image + 1), tl.where(counts, beyond * factor, 0), mask=there)
    if not EACH:
        tl.store(loss + tl.program_id(0).to(tl.int64), tl.sum(result, 0))


def finish(
    partial: Tensor,
    boxes: Boxes,
    kind: int,
    reduction: int,
    loss: Tensor,
    coefficients: Tensor | None,
    tiles: Tiles,
) -> None:
    """The loss and the coefficients, from the sums of tiles."""
    images, each = boxes.annotated.data.shape[0], reduction == NONE
    parts = min(_MOST_PARTS, triton.next_power_of_2(tiles.parts))
    rows = min(triton.next_power_of_2(images), _TILE // parts)
    alone = images <= MOST_IMAGES and not each
    steps = triton.cdiv(images, rows) if alone else 1
    programs = triton.cdiv(images, rows * steps)
    count = None
    if reduction == MEAN and not alone:
        count = loss.new_empty(1)
        add_up(boxes.annotated.data, count)
    sums = loss if each or alone else loss.new_empty(programs)
    arguments = (partial, boxes.annotated, count, sums, coefficients, images, steps, tiles.parts, tiles)
    constants = {"KIND": kind, "MEAN": reduction == MEAN, "EACH": each, "IMAGES": rows, "PARTS": parts}
    launch(_finish, programs, loss, *arguments, warps=4, **constants)
    if sums is not loss:
        add_up(sums, loss)
