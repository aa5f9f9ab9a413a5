"""Localization losses with Triton: forward reads the map once, backward writes its gradient once.

The formulas are those of debiaskd/ops/localization.py. A map is cut into bands of up to 32 rows, and these into strips
of up to 256 columns. A program has a tile of one band, or where maps are narrow of several, of neighbouring maps too:

    _sums                what a tile adds to its map's sums and, for energy, a bit for each pixel: is it positive?
                         Its pixels are loaded or, where the map is smaller than its boxes' frame, blended from 4 cells
    _finish              losses, and two coefficients a map, from the sums of its tiles
    _gradient            by the coefficients, and by the bits or the map
    _upsampled_gradient  gathered into the cells of a small map

Bytes: energy on a map of the boxes' own size reads it in forward and leaves one bit a pixel; backward reads that and
writes the gradient. The other kinds read the map again in backward. Upsampled maps move hardly any bytes: there the
floor is the arithmetic of their pixels.

Launches: forward 2; for more than MOST_IMAGES maps 1 more for their sum, and 1 more to count them for the mean.
Backward 1.

Strides: maps are read in place, 16 bytes at a time where their columns follow each other and rows begin at multiples of
16 bytes. Boxes are copied if they are not contiguous.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bilinear import Resampling, blend, index_of
from .coverage import Boxes, are_annotated, cover, is_covered
from .launch import launch
from .layout import Map, Values
from .localization_finish import finish
from .localization_tiles import ENERGY, add_pixels, factors_of, pixel_gradients
from .localization_upsampled import upsampled_gradient
from .map_tiles import WORDS, cut, inside_tile, pixels_of, tile_of, vector_of
from .precision import accumulator, narrow, widen
from .sums import NONE


@triton.jit
def _words(positive, tiles, images, there, rows, left, COLS: tl.constexpr):
    """Pointers to the words that hold a bit for each pixel of a tile, and which of them there are."""
    words = (tiles.width + 31) // 32
    word = left // 32 + tl.arange(0, COLS // 32)
    there = (there[:, None] & (rows < tiles.height))[:, :, None] & (word < words)[None, None, :]
    row = (images * tiles.height)[:, None] + rows
    return positive + ((row * words)[:, :, None] + word[None, None, :]), there


@triton.jit
def _packed(bits):
    shape: tl.constexpr = bits.shape
    places = tl.arange(0, 32)[None, None, None, :]
    bits = tl.reshape(bits.to(tl.int32), [shape[0], shape[1], shape[2] // 32, 32])
    return tl.sum(bits << places, 3).to(tl.int32)


@triton.jit
def _unpacked(words):
    shape: tl.constexpr = words.shape
    places = tl.arange(0, 32)[None, None, None, :]
    return tl.reshape((words[:, :, :, None] >> places) & 1, [shape[0], shape[1], shape[2] * 32])


@triton.jit(do_not_specialize=("images",))
def _sums(
    maps,
    boxes,
    partial,
    positive,  # None where nobody asked for it
    images,
    tiles,
    vertical,  # None, like `horizontal`, where maps have the boxes' own size
    horizontal,
    KIND: tl.constexpr,
    INDEX: tl.constexpr,
    VECTOR: tl.constexpr,
    BANDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    dtype: tl.constexpr = partial.dtype.element_ty
    image, tops, rows, left = tile_of(tiles, BANDS, ROWS, COLS)
    cols = left + tl.arange(0, COLS)
    counted = are_annotated(boxes, image, images)
    pixels = tl.zeros([BANDS, ROWS, COLS], dtype)
    if tl.max(counted.to(tl.int32), 0) > 0:
        mask = inside_tile(tiles, counted, rows, cols, VECTOR)
        if vertical is None:
            pixels = widen(tl.load(pixels_of(maps, image, rows, cols, VECTOR), mask=mask, other=0), dtype)
        else:
            pixels = blend(maps, image, rows, cols, mask, vertical, horizontal, INDEX, dtype)
        covered = is_covered(cover(boxes, image, counted, tops, cols), ROWS)
        add_pixels(pixels, covered, mask, counted, partial, tiles, KIND)
    if positive is not None:
        # Nobody reads those of a map that is not annotated, but an output is never left unwritten.
        place, there = _words(positive, tiles, image, image < images, rows, left, COLS)
        tl.store(place, _packed(pixels > 0), mask=there)


@triton.jit(do_not_specialize=("images",))
def _gradient(
    maps,  # None where their bits say all
    positive,
    boxes,
    coefficients,
    upstream,
    gradient,
    images,
    tiles,
    KIND: tl.constexpr,
    VECTOR: tl.constexpr,
    BANDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    dtype: tl.constexpr = coefficients.dtype.element_ty
    image, tops, rows, left = tile_of(tiles, BANDS, ROWS, COLS)
    cols = left + tl.arange(0, COLS)
    counted = are_annotated(boxes, image, images)
    values = tl.zeros([BANDS, ROWS, COLS], dtype)
    if tl.max(counted.to(tl.int32), 0) > 0:
        if maps is None:
            place, there = _words(positive, tiles, image, counted, rows, left, COLS)
            pixels = _unpacked(tl.load(place, mask=there, other=0)).to(dtype)
        else:
            there = inside_tile(tiles, counted, rows, cols, VECTOR)
            pixels = widen(tl.load(pixels_of(maps, image, rows, cols, VECTOR), mask=there, other=0), dtype)
        within, beyond = factors_of(coefficients, upstream, image, counted)
        covered = is_covered(cover(boxes, image, counted, tops, cols), ROWS)
        values = pixel_gradients(pixels, covered, within, beyond, KIND)
    place = pixels_of(gradient, image, rows, cols, VECTOR)
    mask = inside_tile(tiles, image < images, rows, cols, VECTOR)
    tl.store(place, narrow(values, gradient.data.dtype.element_ty), mask=mask)


# ---- the functions of csrc/schema.cpp ----


def localization(
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
    images, own = attribution.shape[0], attribution.shape[1:] == (height, width)
    dtype = accumulator(attribution.dtype)
    loss = attribution.new_empty((images,) if reduction == NONE else (), dtype=dtype)
    coefficients = attribution.new_empty((images if with_state else 0, 2), dtype=dtype)
    bits = (images, height, triton.cdiv(width, 32)) if with_state and kind == ENERGY.value and own else (0,)
    positive = attribution.new_empty(bits, dtype=torch.int32)
    if images == 0:
        return loss.zero_(), coefficients, positive
    boxes = Boxes.of(coords, offsets, annotated, mask)
    axes = (None, None) if own else (Resampling(attribution.shape[1], height), Resampling(attribution.shape[2], width))
    tiles, programs, size = cut(images, height, width, WORDS if own else WORDS // 4)  # a blend has the registers of 4
    partial = loss.new_empty((images * tiles.parts, 2))
    maps = Map(attribution, attribution.stride())
    arguments = (maps, boxes, partial, positive if positive.numel() else None, images, tiles, *axes)
    constants = {"KIND": kind, "INDEX": index_of(*axes), "VECTOR": vector_of(attribution, width) if own else 1, **size}
    launch(_sums, programs, loss, *arguments, **constants, warps=8)
    finish(partial, boxes, kind, reduction, loss, coefficients if with_state else None, tiles)
    return loss, coefficients, positive


def localization_backward(
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
    images = annotated.shape[0]
    gradient = coefficients.new_empty((images, map_height, map_width), dtype=dtype)
    if images == 0:
        return gradient
    boxes, upstream = Boxes.of(coords, offsets, annotated, mask), Values.of(grad_output)
    if attribution is not None and (map_height, map_width) != (height, width):
        upsampled_gradient(attribution, boxes, coefficients, upstream, kind, height, width, gradient)
        return gradient
    maps, vector = None, vector_of(gradient, width)
    if attribution is not None and positive.numel() == 0:
        maps, vector = Map(attribution, attribution.stride()), math.gcd(vector, vector_of(attribution, width))
    tiles, programs, size = cut(images, height, width)
    bits = positive if maps is None else None
    to = Map(gradient, gradient.stride())
    arguments = (maps, bits, boxes, coefficients, upstream, to, images, tiles)
    launch(_gradient, programs, gradient, *arguments, KIND=kind, VECTOR=vector, **size, warps=8)
    return gradient
