"""RandAugment of a whole batch on its device: each image by its own operations, boxes and masks with pixels.

Cubuk et al. 2020 (arXiv 1909.13719). Operations and magnitudes are those of `torchvision.transforms.v2.RandAugment`
with 31 bins and the interpolation "nearest": what shears, translations and rotations leave empty is black. Levels of
colour are whole numbers in 0..255, as in uint8 images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.boxes import Boxes
from debiaskd.data.color import grey
from debiaskd.data.crops import kept
from debiaskd.masks import ROWS, Masks, pack_bits

OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "auto_contrast",
    "equalize",
)
#: Magnitudes are whole numbers in 0..30.
MOST = 30
_GEOMETRIC = range(OPERATIONS.index("shear_x"), OPERATIONS.index("rotate") + 1)
#: Pixels by which a transformed box may lie past the edge of a pixel before it takes that pixel as well: rounding.
_SLACK = 1e-3


def rand_augment(
    pixels: Tensor, boxes: Sequence[Boxes], drawn: Tensor, magnitude: int, box_size: tuple[int, int]
) -> tuple[Tensor, list[Boxes]]:
    """Apply to each image the operations that are drawn for it, one after the other.

    A box becomes the smallest box around its transformed corners, clipped to the image; one outside of the image is
    removed, or made empty on an accelerator. A pixel of a mask moves as the image's pixel does.

    Args:
        pixels: floating point [N,3,H,W] in 0..255, rounded to whole levels.
        boxes: any number of `Boxes` of these N images, in pixels of an image of `box_size`.
        drawn: [N, 2 * number of operations] in [0,1): pairs that decide on the operation and on its sign.
        magnitude: in 0..30.
        box_size: (height, width).

    Returns:
        (images [N,3,H,W] of whole numbers in 0..255, the boxes).

    Example:
        >>> image = torch.full((1, 3, 4, 4), 100.0)
        >>> solarized = torch.tensor([[(OPERATIONS.index("solarize") + 0.5) / len(OPERATIONS), 0.0]])
        >>> rand_augment(image, [], solarized, 30, (4, 4))[0].unique()
        tensor([155.])
    """
    pixels, moved = pixels.round(), list(boxes)
    for choice, sign in zip(drawn[:, 0::2].unbind(1), drawn[:, 1::2].unbind(1)):
        chosen = (choice * len(OPERATIONS)).long().clamp(max=len(OPERATIONS) - 1)
        signed = torch.where(sign < 0.5, -1.0, 1.0)
        warp = Warp(chosen, signed, magnitude, (pixels.shape[2], pixels.shape[3]))
        pixels = _colors(_where(pixels, warp.moves, _warped, warp.columns, warp.offsets), chosen, signed, magnitude)
        moved = [warp.boxes(each, box_size) for each in moved]
    return pixels, moved


class Warp:
    """Shears, translations and rotations, one of them or none for each image.

    The point p of the result, in pixels from the upper left corner, shows the point `columns @ p + offsets` of the
    image.

    Args:
        chosen: int64 [N], places in OPERATIONS.
        signed: [N], -1 or 1.
        magnitude: in 0..30.
        size: (height, width) of the images.
    """

    def __init__(self, chosen: Tensor, signed: Tensor, magnitude: int, size: tuple[int, int]) -> None:
        self.size = height, width = size
        self.moves = (chosen >= _GEOMETRIC[0]) & (chosen <= _GEOMETRIC[-1])

        def amount(name: str, value: float) -> Tensor:
            return torch.where(chosen == OPERATIONS.index(name), value * signed, 0.0)

        shear = _level(0.0, 0.3, magnitude)
        angle = amount("rotate", math.radians(_level(0.0, 30.0, magnitude)))
        cos, sin = angle.cos(), angle.sin()
        above, below = amount("shear_x", shear) - sin, amount("shear_y", shear) + sin
        across, down = (int(_level(0.0, 150.0 / 331.0 * side, magnitude)) for side in (width, height))
        # Rotations are about the centre; cos is 1 and sin is 0 for all others.
        x = width / 2 * (1 - cos) + height / 2 * sin - amount("translate_x", across)
        y = height / 2 * (1 - cos) - width / 2 * sin - amount("translate_y", down)
        self.columns = torch.stack([torch.stack([cos, above], 1), torch.stack([below, cos], 1)], 1)
        self.offsets = torch.stack([x, y], 1)

    def boxes(self, boxes: Boxes, size: tuple[int, int]) -> Boxes:
        """Boxes, and masks, in pixels of an image of this (height, width)."""
        image = boxes.image_ids()
        scale = (self.size[1] / size[1], self.size[0] / size[0])
        (a, b), (c, d) = (row.unbind(1) for row in self.columns[image].unbind(1))
        left, top = self.offsets[image].unbind(1)
        x0, y0, x1, y1 = boxes.coords.float().unbind(1)
        x = torch.stack([x0, x1, x1, x0]) * scale[0] - left
        y = torch.stack([y0, y0, y1, y1]) * scale[1] - top
        # All determinants are 1.
        x, y = (d * x - b * y) / scale[0], (a * y - c * x) / scale[1]
        first = torch.stack([x.amin(0), y.amin(0)], 1).add(_SLACK).floor()
        last = torch.stack([x.amax(0), y.amax(0)], 1).sub(_SLACK).ceil()
        sides = ((0, size[1]), (0, size[0]))
        clipped = [
            torch.stack([part[:, axis].clamp(*limits) for axis, limits in enumerate(sides)], 1)
            for part in (first, last)
        ]
        coords = torch.where(self.moves[image][:, None], torch.cat(clipped, 1).to(torch.int32), boxes.coords)
        seen = (coords[:, 2:] > coords[:, :2]).all(1) | ~self.moves[image]
        masks = None if boxes.masks is None else self._masks(boxes.masks, scale)
        return kept(boxes, coords, seen, masks)

    def _masks(self, masks: Masks, scale: tuple[float, float]) -> Masks:
        image, (height, width) = masks.image_ids(), masks.size
        place, inside = _source(self.columns[image], self.offsets[image], (height, width), scale)
        rows, columns = place // width, place % width
        words = masks.words.flatten(1).gather(1, (rows // ROWS * width + columns).flatten(1)).view(-1, height, width)
        dense = ((words >> (rows % ROWS).to(torch.int32)) & 1).bool() & inside
        moved = Masks(pack_bits(dense), height, masks.offsets, masks.labels)
        moved.single = masks.single
        return moved


def _source(
    columns: Tensor, offsets: Tensor, size: tuple[int, int], scale: tuple[float, float] = (1.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """int64 [N,H,W], the pixel of the image, row by row, that each pixel of the result shows; bool, whether it has it.

    `columns` [N,2,2] and `offsets` [N,2] are of an image whose pixels are `scale` times as many, in x and y.
    """
    height, width = size
    x = (torch.arange(width, device=offsets.device) + 0.5) * scale[0]
    y = ((torch.arange(height, device=offsets.device) + 0.5) * scale[1])[:, None]
    (a, b), (c, d) = (row.unbind(1) for row in columns[:, :, :, None, None].unbind(1))
    left, top = offsets[:, :, None, None].unbind(1)
    column = ((a * x + b * y + left) / scale[0]).floor().long()
    row = ((c * x + d * y + top) / scale[1]).floor().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return row.clamp(0, height - 1) * width + column.clamp(0, width - 1), inside


def _warped(pixels: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
    place, inside = _source(columns, offsets, (pixels.shape[2], pixels.shape[3]))
    every = place.flatten(1)[:, None].expand(-1, pixels.shape[1], -1)
    return pixels.flatten(2).gather(2, every).view(pixels.shape) * inside[:, None]


def _colors(pixels: Tensor, chosen: Tensor, signed: Tensor, magnitude: int) -> Tensor:
    factor = 1 + _level(0.0, 0.9, magnitude) * signed
    step = 2.0 ** round(4 * magnitude / MOST)
    threshold = 255 * _level(1.0, 0.0, magnitude)
    for name, change in _BLENDS.items():
        pixels = _where(pixels, chosen == OPERATIONS.index(name), change, factor)
    others: dict[str, Callable[[Tensor], Tensor]] = {
        "posterize": lambda some: (some / step).floor() * step,
        "solarize": lambda some: torch.where(some >= threshold, 255 - some, some),
        "auto_contrast": _auto_contrast,
        "equalize": _equalize,
    }
    for name, without in others.items():
        pixels = _where(pixels, chosen == OPERATIONS.index(name), without)
    return pixels


def _where(pixels: Tensor, chosen: Tensor, change: Callable[..., Tensor], *amounts: Tensor) -> Tensor:
    """`pixels` changed where `chosen`, bool [N], by each image's amounts."""
    if pixels.device.type == "cpu":  # to count the images would synchronise with another device
        rows = chosen.nonzero()[:, 0]
        return pixels.index_copy(0, rows, change(pixels[rows], *(a[rows] for a in amounts))) if len(rows) else pixels
    return torch.where(chosen[:, None, None, None], change(pixels, *amounts), pixels)


def _blend(pixels: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    share = factor[:, None, None, None]
    return (share * pixels + (1 - share) * other).clamp(0, 255).floor()


def _brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return _blend(pixels, torch.zeros_like(pixels), factor)


def _color(pixels: Tensor, factor: Tensor) -> Tensor:
    return _blend(pixels, grey(pixels).floor(), factor)


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    # Summed as integers: the same for any number of images.
    total = grey(pixels).long().sum((1, 2, 3), keepdim=True)
    return _blend(pixels, total / (pixels.shape[2] * pixels.shape[3]), factor)


def _sharpness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blended with the image smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13; pixels at its edge stay."""
    if min(pixels.shape[2:]) < 3:
        return pixels
    inner = pixels[:, :, 1:-1, 1:-1]
    smooth = ((F.avg_pool2d(pixels, 3, 1) * 9 + 4 * inner) / 13).round()
    sharpened = pixels.clone()
    sharpened[:, :, 1:-1, 1:-1] = _blend(inner, smooth, factor)
    return sharpened


_BLENDS = {"brightness": _brightness, "color": _color, "contrast": _contrast, "sharpness": _sharpness}


def _auto_contrast(pixels: Tensor) -> Tensor:
    """Stretch the levels of each channel to 0..255."""
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    level = low == high
    scale = torch.where(level, 1.0, (high - low) * (1 / 255))
    return ((pixels - torch.where(level, 0.0, low)) / scale).clamp(0, 255).floor()


def _equalize(pixels: Tensor) -> Tensor:
    """Give each channel a uniform histogram, by the integer arithmetic of Pillow's `ImageOps.equalize`."""
    values = pixels.long().flatten(2).flatten(0, 1)
    places = values + 256 * torch.arange(len(values), device=values.device)[:, None]
    counts = values.new_zeros(256 * len(values)).index_add_(0, places.flatten(), torch.ones_like(values).flatten())
    below = counts.view(-1, 256).cumsum(1)
    last = counts.view(-1, 256).gather(1, below.argmax(1, keepdim=True))
    step = torch.div(values.shape[1] - last, 255, rounding_mode="floor")
    table = torch.div(below + step // 2, step.clamp(min=1), rounding_mode="floor").clamp(0, 255)
    table = F.pad(table[:, :-1], (1, 0))
    equalized = table.gather(1, values).to(pixels.dtype).view(pixels.shape)
    return torch.where((step == 0).view(*pixels.shape[:2], 1, 1), pixels, equalized)


def _level(first: float, last: float, magnitude: int) -> float:
    """The strength of a magnitude, rounded as torchvision's table of 31 is."""
    return float(torch.linspace(first, last, MOST + 1)[magnitude])
