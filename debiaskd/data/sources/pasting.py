"""Draw digits onto photographs with integer arithmetic: the same bytes on every machine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from debiaskd.data import pixels

# The side of a digit's 28×28 grid, as a share of the image's; its ink takes 20 of the 28.
SMALLEST, LARGEST = 0.55, 0.95
FAINTEST = 0.15  # ink below this share of the darkest is the blur around a stroke: left out of digit and box
FRACTIONS = 1 << 16  # places between the edges are drawn as whole numbers below this
TINTS = 48  # how far a channel of the ink may be from black or full
_CORNERS = np.array([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)], np.int64)


@dataclass(frozen=True)
class Sheet:
    """Some images before they are drawn; `sheet[i]` draws one, uint8 [size,size,3].

    Attributes:
        photographs: uint8 [n,H,W,3].
        digits: uint8 [n,28,28], ink 255.
        sides: int64 [n], of the digits' grids in the image.
        places: int64 [n,2], x and y as fractions of `FRACTIONS`.
        tints: int64 [n,3] in 0..`TINTS` - 1.
        size: side of the images.
    """

    photographs: NDArray[np.uint8]
    digits: NDArray[np.uint8]
    sides: NDArray[np.int64]
    places: NDArray[np.int64]
    tints: NDArray[np.int64]
    size: int

    def __getitem__(self, i: int) -> NDArray[np.uint8]:
        picture = pixels.resized(self.photographs[i], self.size)
        ink = scaled_ink(self.digits[i], int(self.sides[i]))
        x0, y0, x1, y1 = box(ink, self.places[i], self.size)
        under = picture[y0:y1, x0:x1]
        alpha = ink[:, :, None].astype(np.int64)
        colour = contrasting(under[ink > 0], self.tints[i])
        under[...] = (under * (255 - alpha) + colour * alpha + 127) // 255
        return picture


def scaled_ink(digit: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The digit with its grid at `side` pixels, cut to its ink: uint8 [h,w], in each edge of which there is some."""
    ink = pixels.resized(digit, side)
    ink[ink < max(1, FAINTEST * int(ink.max()))] = 0
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def box(ink: NDArray[np.uint8], place: NDArray[np.int64], size: int) -> tuple[int, int, int, int]:
    """Where the ink lies, (x0, y0, x1, y1): at any place within the image alike."""
    height, width = ink.shape
    x0, y0 = (int(p) * (size - side + 1) // FRACTIONS for p, side in zip(place, (width, height)))
    return x0, y0, x0 + width, y0 + height


def contrasting(under: NDArray[np.uint8], tint: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of black, white and the six full colours, each toned by `tint`, the one with the largest distance that all but a
    tenth of the pixels `under` [m,3] it keep."""
    colours = np.abs(_CORNERS - tint)
    distances = ((under.astype(np.int64) - colours[:, None]) ** 2).sum(2)
    kept = np.partition(distances, len(under) // 10, axis=1)[:, len(under) // 10]
    chosen: NDArray[np.int64] = colours[kept.argmax()]
    return chosen
