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

from debiaskd.data.batch import Batch
from debiaskd.data.color import jitter_colors
from debiaskd.data.crops import crop_resize, crop_resize_boxes, flip_boxes
from debiaskd.data.mixing import Mixing
from debiaskd.data.rand_augment import MOST, rand_augment
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
        rand_augment: (operations, magnitude): so many random operations on each image, of a magnitude in 0..30, after
            crops and flips and before colours, as `torchvision.transforms.v2.RandAugment` has them. Boxes and masks
            are sheared, moved and rotated with the pixels. None: none.
        mixup, cutmix: the alpha of `Mixing`, which comes last; the result's `partner` and `share` say how images were
            mixed, target and boxes are those of the image itself. None: images are not mixed.

    Crops are interpolated bilinearly. The memory format is kept.

    Raises:
        TypeError, ValueError: arguments out of range.

    Example:
        >>> images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        >>> from debiaskd import Boxes
        >>> batch = Batch(images, torch.tensor([0, 1]), Boxes.from_lists([[[4, 4, 20, 20]], None]))
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
        rand_augment: tuple[int, int] | None = None,
        mixup: float | None = None,
        cutmix: float | None = None,
    ) -> None:
        checks.flag("flip", flip)
        checks.option("interpolation", interpolation, INTERPOLATIONS)
        if size is None and crop_scale is not None:
            raise ValueError("size must be given for random crops, got None")
        self.size = None if size is None else checks.size("size", (size, size) if isinstance(size, int) else size)
        self.box_size = None if box_size is None else checks.size("box_size", box_size)
        self.interpolation = interpolation
        self.color_jitter = None if color_jitter is None else _strength(color_jitter)
        self.rand_augment = None if rand_augment is None else _operations(rand_augment)
        self.mixing = None if mixup is None and cutmix is None else Mixing(mixup, cutmix)
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
        if self.rand_augment is not None:
            operations, magnitude = self.rand_augment
            drawn = draw((count, 2 * operations), images.device)
            pixels, every = rand_augment(pixels, every, drawn.to(pixels.dtype), magnitude, box_size)
        if self.color_jitter is not None:
            drawn = draw((count, 4), images.device)
            pixels = jitter_colors(pixels / 255, drawn.to(pixels.dtype), self.color_jitter) * 255
        if self.mixing is not None:
            pixels, *mixed = self.mixing(pixels, draw((count, 4), images.device).to(pixels.dtype))
            batch = dataclasses.replace(batch, partner=mixed[0], share=mixed[1])
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


def _strength(value: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    names = ("brightness", "contrast", "saturation", "hue")
    if not isinstance(value, Sequence) or len(value) != len(names):
        raise ValueError(f"color_jitter must be ({', '.join(names)}), got {value!r}")
    brightness, contrast, saturation, hue = (checks.number(n, v, minimum=0) for n, v in zip(names, value))
    if hue > 0.5:
        raise ValueError(f"hue must lie in [0, 0.5], got {hue}")
    return brightness, contrast, saturation, hue


def _operations(value: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"rand_augment must be (operations, magnitude), got {value!r}")
    operations, magnitude = (checks.integer("rand_augment", part) for part in value)
    if operations < 1 or not 0 <= magnitude <= MOST:
        raise ValueError(f"rand_augment must be (operations >= 1, magnitude in 0..{MOST}), got {value!r}")
    return operations, magnitude


def _interval(name: str, value: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"{name} must be a (smallest, largest) pair, got {value!r}")
    low, high = (checks.number(name, v, minimum=0, exclusive=True) for v in value)
    if low > high:
        raise ValueError(f"{name} must be a (smallest, largest) pair, got {value}")
    return low, high
