"""What the localization kernels share: how maps are cut into tiles, and what becomes of their pixels."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .coverage import ROWS
from .launch import LARGE_TILES
from .precision import divide

BANDS = 8  # of up to 32 rows each, in a tile, at most
COLUMNS = 512 if LARGE_TILES else 256  # of a tile, at most
WORDS = 4096 if LARGE_TILES else 256  # of a tile, one for each column of a band, at most

# The codes of debiaskd/ops/localization.py.
ENERGY, L1, PPCE, RRR = (tl.constexpr(kind) for kind in range(4))


class Tiles(NamedTuple):
    """Maps of `height` x `width` in a kernel, cut into `bands` of rows each, and these into `strips` side by side."""

    height: int
    width: int
    bands: int
    strips: int

    @property
    def parts(self) -> int:
        """Of a map."""
        return self.bands * self.strips


class Cut(NamedTuple):
    """How maps are dealt out to programs: BANDS neighbouring bands of ROWS rows and COLS columns to each."""

    tiles: Tiles
    programs: int
    constants: dict[str, int]


def cut(images: int, height: int, width: int, words: int = WORDS) -> Cut:
    """Into tiles of so many words at most."""
    rows = min(ROWS, triton.next_power_of_2(height))
    cols = min(COLUMNS, words, max(32, triton.next_power_of_2(width)))
    tiles = Tiles(height, width, triton.cdiv(height, rows), triton.cdiv(width, cols))
    bands = min(BANDS, words // cols, triton.next_power_of_2(images * tiles.bands))
    programs = triton.cdiv(images * tiles.bands, bands) * tiles.strips
    return Cut(tiles, programs, {"BANDS": bands, "ROWS": rows, "COLS": cols})


@triton.jit
def tile_of(tiles, BANDS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The bands of this program, numbered throughout the batch: their images, tops and rows; where columns begin."""
    program = tl.program_id(0)
    band = program // tiles.strips * BANDS + tl.arange(0, BANDS)
    tops = (band % tiles.bands).to(tl.int64) * ROWS
    rows = tops[:, None] + tl.arange(0, ROWS)[None, :]
    return (band // tiles.bands).to(tl.int64), tops, rows, (program % tiles.strips).to(tl.int64) * COLS


@triton.jit
def _log(x):
    """-100 at least. A subnormal number, which some GPUs take for 0, is multiplied by 2^24 first."""
    dtype: tl.constexpr = x.dtype
    small = x < 1e-36
    log = tl.log(tl.where(small, x * 16777216, x)) - tl.where(small, tl.full([], 16.635532333438686, dtype), 0)
    return tl.where(log < -100, -100, log)


@triton.jit
def add_pixels(pixels, covered, mask, counted, partial, tiles, KIND: tl.constexpr):
    """Stores what each band adds to the sums of its map: two numbers, of which the second means by kind: the positive
    part inside of the boxes (energy), pixels inside (ppce), nothing."""
    if KIND == ENERGY:
        term = tl.where(pixels < 0, 0, pixels)  # this way round a NaN stays one, and shows in the loss
        inside = tl.where(covered, term, 0)
    elif KIND == L1:
        term = tl.abs(pixels - covered.to(pixels.dtype))
        inside = tl.zeros_like(pixels)
    elif KIND == PPCE:
        term = tl.where(covered, -_log(tl.where(pixels < 0, 0, pixels)), 0)
        inside = (covered & mask).to(pixels.dtype)
    else:
        term = pixels * tl.where(covered, 0, pixels)
        inside = tl.zeros_like(pixels)
    program = tl.program_id(0)
    band = (program // tiles.strips).to(tl.int64) * term.shape[0] + tl.arange(0, term.shape[0])
    place = 2 * (band * tiles.strips + program % tiles.strips)
    tl.store(partial + place, tl.sum(tl.sum(tl.where(mask, term, 0), 2), 1), mask=counted)
    tl.store(partial + (place + 1), tl.sum(tl.sum(inside, 2), 1), mask=counted)


@triton.jit
def factors_of(coefficients, upstream, images, counted):
    """Of a map's gradient inside and outside of its boxes, for each band."""
    scale = tl.load(upstream.data + images * upstream.stride, mask=counted, other=0)
    within = scale * tl.load(coefficients + 2 * images, mask=counted, other=0)
    beyond = scale * tl.load(coefficients + (2 * images + 1), mask=counted, other=0)
    return within[:, None, None], beyond[:, None, None]


@triton.jit
def pixel_gradients(pixels, covered, within, beyond, KIND: tl.constexpr):
    """d loss / d pixel. `within` and `beyond` are the factors of its map."""
    dtype: tl.constexpr = pixels.dtype
    factor = tl.where(covered, within, beyond)
    if KIND == ENERGY:
        return tl.where(pixels > 0, factor, 0)
    elif KIND == L1:
        difference = pixels - covered.to(dtype)
        return tl.where(difference > 0, factor, tl.where(difference < 0, -factor, 0))
    elif KIND == PPCE:
        counts = covered & (pixels > tl.full([], 3.720075976020836e-44, dtype))  # whose logarithm is not clamped
        return tl.where(counts, divide(factor, tl.where(counts, pixels, 1)), 0)
    else:
        return factor * pixels
