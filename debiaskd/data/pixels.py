"""Decode image files to uint8 RGB of one size, and transform their boxes.

An EXIF orientation is not applied, because the boxes of COCO, VOC and CUB refer to stored pixels. Transparency is
ignored, as in torchvision's loaders. 16-bit grey levels are scaled, not clipped.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from debiaskd.boxes import Boxes

if TYPE_CHECKING:
    from PIL import Image

FITS = ("squash", "pad")


class UnreadableError(Exception):
    """An image file cannot be decoded. `kind` is the category in the summary; the text is the reason."""

    def __init__(self, kind: str, reason: object) -> None:
        super().__init__(" ".join(str(reason).split()))
        self.kind = kind


def decode(path: Path) -> Image.Image:
    """The image as RGB.

    Raises:
        UnreadableError: the file is missing, is not an image, is truncated or larger than pillow decodes, or cannot be
            converted to RGB.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; pixels that cannot be read raise
            with Image.open(path) as image:
                image.load()
                return rgb(image)
    except FileNotFoundError as error:
        raise UnreadableError("missing file", error.strerror) from None
    except Exception as error:  # whatever a broken file makes a decoder stumble over
        if isinstance(error, OSError) and error.errno is not None:
            raise UnreadableError("file that cannot be read", error.strerror) from None
        kind = "image larger than pillow decodes" if isinstance(error, Image.DecompressionBombError) else None
        raise UnreadableError(kind or "truncated or non-image file", error) from None


def from_array(pixels: NDArray[np.uint8]) -> Image.Image:
    """The image that is uint8 [H,W,3], RGB, already."""
    from PIL import Image

    return Image.fromarray(pixels)


def resized(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """uint8 [H,W,3] or [H,W] by antialiased bilinear interpolation to `size` × `size`, a new array."""
    from PIL import Image

    return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits, which pillow may hold in 32; its own conversion cuts at 255
        wide = np.asarray(image, np.int64).clip(0, 65535)
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    return image if image.mode == "RGB" else image.convert("RGB")


def fit(image: Image.Image, size: int, how: str) -> tuple[NDArray[np.uint8], tuple[int, int], tuple[int, int]]:
    """Resized by antialiased bilinear interpolation to [size,size,3].

    Also gives the (height, width) that the image itself takes and its (top, left): all and (0, 0) for "squash"; for
    "pad" its shape is kept, and it is centred on black.
    """
    from PIL import Image

    if how == "squash":
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)), (size, size), (0, 0)
    longest = max(image.size)
    width, height = (max(1, math.floor(side * size / longest + 0.5)) for side in image.size)
    top, left = (size - height) // 2, (size - width) // 2
    padded = np.zeros((size, size, 3), np.uint8)
    padded[top : top + height, left : left + width] = np.asarray(
        image.resize((width, height), Image.Resampling.BILINEAR)
    )
    return padded, (height, width), (top, left)


def to_pixels(coords: NDArray[np.float64], height: int, width: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Clipped to the image and rounded to pixel edges; what covers anything keeps at least a pixel.

    Returns:
        int32 [k,4], and bool [k]: which boxes lie in the image at all. The others' rows mean nothing.
    """
    limit = np.array([width, height] * 2, np.float64)
    clipped = coords.clip(0, limit)
    inside: NDArray[np.bool_] = np.all(clipped[:, 2:] > clipped[:, :2], axis=1)
    rounded = np.floor(clipped + 0.5)
    start = np.minimum(rounded[:, :2], limit[:2] - 1)
    end = np.maximum(rounded[:, 2:], start + 1)
    return np.concatenate([start, end], 1).astype(np.int32), inside


def fit_boxes(
    coords: NDArray[np.int32],
    old: tuple[int, int],
    size: int,
    placed: tuple[int, int],
    corner: tuple[int, int],
) -> NDArray[np.int32]:
    """int32 [k,4] in an image of `old` (height, width) to where `fit` put it. Every box stays."""
    boxes = Boxes(torch.from_numpy(coords), torch.tensor([0, len(coords)])).resize(old, placed)
    if corner != (0, 0):
        boxes = boxes.crop(-corner[0], -corner[1], size, size)
    return boxes.coords.numpy()
