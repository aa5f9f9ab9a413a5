"""Augmentation of a whole batch on its device, boxes with pixels, without synchronisation.

A crop is a window of whole pixels, so that the position of a box in it is exact before resizing; rounding changes a box
by at most half a pixel of the result on each side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.boxes import Boxes
from debiaskd.data.batch import Batch
from debiaskd.data.color import jitter_colors
from debiaskd.masks import Masks
from debiaskd.models.input import IMAGENET_MEAN as MEAN
from debiaskd.models.input import IMAGENET_STD as STD
from debiaskd.models.input import INTERPOLATIONS, resize
from debiaskd.utils import checks

_TRIES = 10

Random: TypeAlias = Callable[[tuple[int, ...], torch.device], Tensor]


class Augment:
    """Apply random resized crops, flips, resizing and normalisation to a `Batch` of uint8 images on its device.

    Args:
        size: side of the result in pixels, or (height, width); None: images that are not cropped keep their size.
        flip: mirror each image left to right with probability 0.5.
        crop_scale: smallest and largest share of the image's area that a random crop takes, such as (0.08, 1);
            None: no crop.
        crop_ratio: smallest and largest width / height of the crop.
        mean, std: of the pixels in 0..1, one number per channel: (pixel / 255 - mean) / std. None: keep 0..1.
        dtype: dtype of the result.
        generator: random generator; None: the device's own. A generator on the CPU gives the same crops on every
            device.
        interpolation: for an image of another size that is not cropped: "nearest", "bilinear" or "bicubic", the latter
            two with antialiasing.
        box_size: (height, width) that the resulting boxes refer to; None: the size of the result.
        color_jitter: (brightness, contrast, saturation, hue), how far colours change, as `jitter_colors` has it, after
            crops and flips; None: not at all.

    Crops are interpolated bilinearly. The memory format is kept.

    Raises:
        TypeError, ValueError: arguments out of range.

    Example:
        >>> pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        >>> batch = Batch(pictures, torch.tensor([0, 1]), Boxes.from_lists([[[4, 4, 20, 20]], None]))
        >>> made = Augment(24, crop_scale=(0.5, 1))(batch)
        >>> made.images.shape, made.images.dtype, len(made.boxes)
        (torch.Size([2, 3, 24, 24]), torch.float32, 2)
    """

    def __init__(
        self,
        size: int | tuple[int, int] | None,
        *,
        flip: bool = True,
        crop_scale: tuple[float, float] | None = None,
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        mean: Sequence[float] | None = MEAN,
        std: Sequence[float] | None = STD,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        interpolation: str = "bilinear",
        box_size: tuple[int, int] | None = None,
        color_jitter: tuple[float, float, float, float] | None = None,
    ) -> None:
        checks.flag("flip", flip)
        checks.option("interpolation", interpolation, INTERPOLATIONS)
        if size is None and crop_scale is not None:
            raise ValueError("size must be given for random crops, got None")
        self.size = None if size is None else checks.size("size", (size, size) if isinstance(size, int) else size)
        self.box_size = None if box_size is None else checks.size("box_size", box_size)
        self.interpolation = interpolation
        self.color_jitter = None if color_jitter is None else _strength(color_jitter)
        self.flip = flip
        self.crop_scale = None if crop_scale is None else _interval("crop_scale", crop_scale)
        if self.crop_scale is not None and self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale must lie in (0, 1], got {crop_scale}")
        self.crop_ratio = _interval("crop_ratio", crop_ratio)
        if (mean is None) != (std is None):
            raise ValueError(f"mean and std must be given together, got mean={mean}, std={std}")
        self.mean, self.std = mean, std
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
        self.dtype, self.generator = dtype, generator
        self.constants: tuple[tuple[Any, ...], Tensor, Tensor] | None = None  # of the images of the last call

    def __call__(self, batch: Batch, random: Random | None = None) -> Batch:
        """Return the batch with images of `dtype` [N,3,*size] and the transformed boxes.

        Args:
            batch: see above.
            random: function of (shape, device) that returns uniform numbers in [0,1); used instead of the generator.

        Raises:
            TypeError: `batch` is not a `Batch`, or its images are not uint8.
            ValueError: their shape is not [N,C,H,W].
        """
        if not isinstance(batch, Batch):
            raise TypeError(f"batch must be a Batch, got {type(batch).__name__}")
        images = checks.tensor("images", batch.images)
        checks.rank("images", images, "[N,C,H,W]")
        if images.dtype != torch.uint8:
            raise TypeError(f"images must be torch.uint8, got {images.dtype}")
        count, _, height, width = images.shape
        every = [batch.boxes] + ([] if batch.ignore is None else [batch.ignore])
        order = (
            torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        )
        pixels = images.float()
        size = self.size or (height, width)
        box_size = self.box_size or size
        draw = random or self._random
        flipped = draw((count,), images.device) < 0.5 if self.flip else None
        if self.crop_scale is not None:
            windows = self._windows(draw((count, 2 * _TRIES + 2), images.device), height, width)
            pixels = crop_resize(pixels, windows, size, flipped)
            every = [crop_resize_boxes(boxes, windows, box_size) for boxes in every]
        else:
            if (height, width) != size:
                pixels = resize(pixels, size, self.interpolation, top=255)
            if (height, width) != box_size:
                every = [boxes.resize((height, width), box_size) for boxes in every]
            if flipped is not None:
                pixels = torch.where(flipped[:, None, None, None], pixels.flip(3), pixels)
        if flipped is not None:
            every = [flip_boxes(boxes, flipped, box_size[1]) for boxes in every]
        if self.color_jitter is not None:
            drawn = draw((count, 4), images.device)
            pixels = jitter_colors(pixels / 255, drawn.to(pixels.dtype), self.color_jitter) * 255
        images = self._normalized(pixels).contiguous(memory_format=order)
        return dataclasses.replace(batch, images=images, boxes=every[0], ignore=every[1] if len(every) > 1 else None)

    def _normalized(self, pixels: Tensor) -> Tensor:
        """`pixels`, a tensor of this call's own, is overwritten."""
        if self.mean is None or self.std is None:
            return pixels.div_(255).to(self.dtype)
        mean, std = self._constants(pixels)
        return pixels.sub_(mean).div_(std).to(self.dtype)

    def _constants(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of pixels in 0..255, [C,1,1].

        On the CPU as large as an image: a loop over the three channels of a channels_last image is not vectorised.
        """
        channels, *size = pixels.shape[1:]
        last = pixels.is_contiguous(memory_format=torch.channels_last)
        key = (pixels.device, channels, *(size if pixels.device.type == "cpu" else ()), last)
        if self.constants is None or self.constants[0] != key:
            mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] * 255 for v in (self.mean, self.std))
            if mean.shape[0] not in (1, channels):
                raise ValueError(f"images must have {mean.shape[0]} channels, as mean has, got {channels}")
            if pixels.device.type == "cpu":
                order = torch.channels_last if last else torch.contiguous_format
                mean, std = (value.expand(1, channels, *size).contiguous(memory_format=order) for value in (mean, std))
            self.constants = key, mean, std
        return self.constants[1:]

    def _random(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        drawn_on = device if self.generator is None else self.generator.device
        return torch.rand(shape, generator=self.generator, device=drawn_on).to(device, non_blocking=True)

    def _windows(self, drawn: Tensor, height: int, width: int) -> Tensor:
        """int64 [N,4], rows (x0, y0, x1, y1). The first of ten random sizes that fits, else the largest central window
        with an allowed ratio.
        """
        assert self.crop_scale is not None
        (low, high), (narrow, wide) = self.crop_scale, self.crop_ratio
        area = height * width * (low + (high - low) * drawn[:, :_TRIES])
        ratio = (math.log(narrow) + (math.log(wide) - math.log(narrow)) * drawn[:, _TRIES : 2 * _TRIES]).exp()
        w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
        first = fits.to(torch.uint8).argmax(1, keepdim=True)
        found = fits.gather(1, first)[:, 0]
        shape = min(max(width / height, narrow), wide)
        whole_w, whole_h = max(1, min(width, round(height * shape))), max(1, min(height, round(width / shape)))
        w = torch.where(found, w.gather(1, first)[:, 0], float(whole_w))
        h = torch.where(found, h.gather(1, first)[:, 0], float(whole_h))
        room_x, room_y = width - w, height - h
        x = torch.where(found, (drawn[:, -2] * (room_x + 1)).floor().minimum(room_x), (room_x / 2).floor())
        y = torch.where(found, (drawn[:, -1] * (room_y + 1)).floor().minimum(room_y), (room_y / 2).floor())
        return torch.stack([x, y, x + w, y + h], 1).long()


def crop_resize(images: Tensor, windows: Tensor, size: tuple[int, int], flipped: Tensor | None = None) -> Tensor:
    """Crop a window of every image, resize it bilinearly and, where `flipped`, mirror it.

    Args:
        images: floating point [N,C,H,W].
        windows: integers [N,4], rows (x0, y0, x1, y1) within the image, at least a pixel large.
        size: (height, width) of the result.
        flipped: bool [N], or None.

    Returns:
        [N,C,*size].
    """
    height, width = images.shape[2:]
    (x, left), (y, top) = (_samples(windows, axis, size[1 - axis]) for axis in (0, 1))
    if flipped is not None:
        x = torch.where(flipped[:, None], x.flip(1), x)
    # Pixels outside the window must not contribute to its edge.
    x = x.clamp(left[0][:, None] + 0.5, left[1][:, None] - 0.5) * (2 / width) - 1
    y = y.clamp(top[0][:, None] + 0.5, top[1][:, None] - 0.5) * (2 / height) - 1
    grid = torch.stack([x[:, None, :].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], -1)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)


def _samples(windows: Tensor, axis: int, steps: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    start, end = windows[:, axis].float(), windows[:, axis + 2].float()
    centres = (torch.arange(steps, device=windows.device) + 0.5) / steps
    return start[:, None] + (end - start)[:, None] * centres, (start, end)


def crop_resize_boxes(boxes: Boxes, windows: Tensor, size: tuple[int, int]) -> Boxes:
    """Transform boxes like `crop_resize`: clip them to the window, and remove those outside it.

    On an accelerator they become empty instead of being removed, as in `Boxes.crop`. A box that covers part of the
    window keeps at least one pixel. Masks move too, by `Masks.crop_resize`, and may lose what is thinner than a pixel.

    Args:
        boxes: of N images.
        windows, size: as for `crop_resize`.

    Raises:
        ValueError: not one window per image.
    """
    checks.shape("windows", windows, "[N,4]", [len(boxes), 4])
    mine = windows[boxes.image_ids()].long()
    begin, extent = mine[:, :2], mine[:, 2:] - mine[:, :2]
    coords = boxes.coords.long()
    start = (coords[:, :2] - begin).clamp(min=0).minimum(extent)
    end = (coords[:, 2:] - begin).clamp(min=0).minimum(extent)
    seen = (end > start).all(1)
    target = torch.tensor([size[1], size[0]], device=coords.device)
    # Rounded to the nearest edge with integers: exact, and equal on every device.
    first = torch.div(2 * start * target + extent, 2 * extent, rounding_mode="floor").minimum(target - 1)
    last = torch.div(2 * end * target + extent, 2 * extent, rounding_mode="floor").maximum(first + 1)
    masks = None if boxes.masks is None else boxes.masks.crop_resize(windows, size)
    return _kept(boxes, torch.cat([first, last], 1).to(torch.int32), seen, masks)


def flip_boxes(boxes: Boxes, flipped: Tensor, width: int) -> Boxes:
    """Mirror boxes in images `width` pixels wide where `flipped`, bool [N]."""
    checks.shape("flipped", flipped, "[N]", [len(boxes)])
    x0, y0, x1, y1 = boxes.coords.unbind(1)
    mirrored = torch.stack([width - x1, y0, width - x0, y1], 1)
    coords = torch.where(flipped[boxes.image_ids()][:, None], mirrored, boxes.coords)
    masks = None if boxes.masks is None else boxes.masks.hflip(flipped)
    return Boxes(coords, boxes.offsets, boxes.labels, boxes.annotated, masks)


def _kept(boxes: Boxes, coords: Tensor, keep: Tensor, masks: Masks | None) -> Boxes:
    if coords.device.type != "cpu":  # counting the remaining boxes would synchronise with the device
        return Boxes(coords * keep[:, None], boxes.offsets, boxes.labels, boxes.annotated, masks)
    before = torch.cat([boxes.offsets.new_zeros(1), keep.cumsum(0)])
    labels = None if boxes.labels is None else boxes.labels[keep]
    return Boxes(coords[keep], before[boxes.offsets], labels, boxes.annotated, masks)


def _strength(value: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    names = ("brightness", "contrast", "saturation", "hue")
    if not isinstance(value, Sequence) or len(value) != len(names):
        raise ValueError(f"color_jitter must be ({', '.join(names)}), got {value!r}")
    brightness, contrast, saturation, hue = (checks.number(n, v, minimum=0) for n, v in zip(names, value))
    if hue > 0.5:
        raise ValueError(f"hue must lie in [0, 0.5], got {hue}")
    return brightness, contrast, saturation, hue


def _interval(name: str, value: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"{name} must be a (smallest, largest) pair, got {value!r}")
    low, high = (checks.number(name, v, minimum=0, exclusive=True) for v in value)
    if low > high:
        raise ValueError(f"{name} must be a (smallest, largest) pair, got {value}")
    return low, high
