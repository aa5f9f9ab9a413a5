"""Colours of images changed, each image by its own amount, without synchronisation.

Pixels are floating point [N,3,H,W] in 0..1, amounts [N]. Each function does to an image what the function of the same
name in `torchvision.transforms.v2.functional` does to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)


def adjust_brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Multiply by `factor`: 0 is black."""
    return (pixels * _each(factor)).clamp(0, 1)


def adjust_contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean of the grey image: 0 is one level of grey."""
    return _blend(pixels, grey(pixels).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image: 0 is grey."""
    return _blend(pixels, grey(pixels), factor)


def adjust_hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by a share of the circle in [-0.5, 0.5]."""
    high, low = pixels.amax(1), pixels.amin(1)
    red, green, blue = pixels.unbind(1)
    spread = high - low
    level = spread == 0
    divisor = torch.where(level, 1, spread)
    red_part, green_part, blue_part = ((high - one) / divisor for one in (red, green, blue))
    by_red, by_green = high == red, high == green
    hue = torch.where(by_red, blue_part - green_part, 0.0)
    hue = hue + torch.where(by_green & ~by_red, 2.0 + red_part - blue_part, 0.0)
    hue = hue + torch.where(~by_green & ~by_red, 4.0 + green_part - red_part, 0.0)
    hue = (hue / 6.0 + 1.0 + turn[:, None, None]) % 1.0
    # Each channel is the highest value less the spread over part of the circle, linear in between.
    saturation = spread / torch.where(level, 1, high)
    channels = []
    for offset in (5.0, 3.0, 1.0):
        place = (offset + 6.0 * hue) % 6.0
        channels.append(high * (1 - saturation * torch.minimum(place, 4 - place).clamp(0, 1)))
    return torch.stack(channels, 1)


def jitter_colors(pixels: Tensor, drawn: Tensor, strength: tuple[float, float, float, float]) -> Tensor:
    """Change brightness, contrast, saturation and hue of each image, in this order.

    Args:
        pixels: [N,3,H,W] in 0..1.
        drawn: [N,4] in [0,1).
        strength: (b, c, s, h): the first three factors are uniform in [max(0, 1 - b), 1 + b] and alike, the hue is
            turned by a share of the circle uniform in [-h, h]. 0 changes nothing.

    Returns:
        [N,3,H,W] in 0..1.

    Example:
        >>> grey = torch.full((1, 3, 2, 2), 0.5)
        >>> jitter_colors(grey, torch.zeros(1, 4), (0.5, 0, 0, 0))[0, 0, 0, 0].item()
        0.25
    """
    for place, change in enumerate((adjust_brightness, adjust_contrast, adjust_saturation)):
        if strength[place] > 0:
            low, high = max(0.0, 1 - strength[place]), 1 + strength[place]
            pixels = change(pixels, low + (high - low) * drawn[:, place])
    if strength[3] > 0:
        pixels = adjust_hue(pixels, strength[3] * (2 * drawn[:, 3] - 1))
    return pixels


def grey(pixels: Tensor) -> Tensor:
    """[N,1,H,W]."""
    red, green, blue = pixels.unbind(1)
    return (GREY[0] * red + GREY[1] * green + GREY[2] * blue)[:, None]


def _blend(pixels: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    share = _each(factor)
    return (share * pixels + (1 - share) * other).clamp(0, 1)


def _each(amount: Tensor) -> Tensor:
    return amount[:, None, None, None]
