"""How maps are cut into tiles, and where the pixels of a tile are."""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .coverage import ROWS
from .launch import LARGE_TILES
from .layout import multiple

BANDS = 8  # of up to 32 rows each, in a tile, at most
COLUMNS = 512 if LARGE_TILES else 256  # of a tile, at most
WORDS = 4096 if LARGE_TILES else 256  # of a tile, one for each column of a band, at most


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
def pixels_of(maps, images, rows, cols, VECTOR: tl.constexpr):
    """Pointers to the pixels of a tile. Where VECTOR is not 1, the last stride is, and others are multiples of it."""
    offset = (images * multiple(maps.strides[0], VECTOR))[:, None] + rows * multiple(maps.strides[1], VECTOR)
    return maps.data + (offset[:, :, None] + cols[None, None, :] * maps.strides[2])


@triton.jit
def inside_tile(tiles, images, rows, cols, VECTOR: tl.constexpr):
    """Which pixels of a tile there are, in images that are there."""
    return (images[:, None] & (rows < tiles.height))[:, :, None] & (cols < multiple(tiles.width, VECTOR))[None, None, :]


def vector_of(maps: Tensor, width: int) -> int:
    """How many pixels of a row lie side by side wherever one of 16 bytes begins; 1 where rows do not begin there."""
    if maps.stride(2) != 1:
        return 1
    return math.gcd(16 // maps.itemsize, width, maps.stride(1), maps.stride(0) if maps.shape[0] > 1 else 0)
