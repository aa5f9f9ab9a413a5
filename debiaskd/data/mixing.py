"""mixup and CutMix: each image of a batch takes a share of another one of the same batch.

Zhang et al. 2018 (arXiv 1710.09412); Yun et al. 2019 (arXiv 1905.04899).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from debiaskd.utils import checks

#: Intervals of the table that a Beta distribution is drawn by.
_STEPS = 4096


class Mixed(NamedTuple):
    """Mixed images [N,C,H,W]; partner int64 [N], which image each one took from; share [N], how much is its own."""

    images: Tensor
    partner: Tensor
    share: Tensor


class Mixing:
    """Mix each image of a batch with the one before it, the first with the last.

    Args:
        mixup: alpha: an image is share * image + (1 - share) * partner, share from Beta(alpha, alpha); None: not so.
        cutmix: alpha: a window with 1 - share of the area, anywhere in the image and cut off at its edge, shows the
            partner; None: not so. With both, each image is mixed in one way or the other with probability 0.5.

    Raises:
        ValueError: neither is given, or an alpha is not > 0.

    Example:
        >>> images = torch.tensor([0.0, 8.0]).reshape(2, 1, 1, 1)
        >>> mixed = Mixing(1.0, None)(images, torch.full((2, 4), 0.25))
        >>> mixed.images.flatten().tolist(), mixed.partner.tolist(), mixed.share.tolist()
        ([6.0, 2.0], [1, 0], [0.25, 0.25])
    """

    def __init__(self, mixup: float | None, cutmix: float | None) -> None:
        given = {"mixup": mixup, "cutmix": cutmix}
        self.tables = {
            name: Beta(checks.number(name, alpha, minimum=0, exclusive=True))
            for name, alpha in given.items()
            if alpha is not None
        }
        if not self.tables:
            raise ValueError("mixup or cutmix must be given, got neither")

    def __call__(self, images: Tensor, drawn: Tensor) -> Mixed:
        """Mix floating-point images [N,C,H,W] by random numbers [N,4] in [0,1): for the way, the share, and the
        window's centre."""
        count, _, height, width = images.shape
        way, uniform, x, y = drawn.unbind(1)
        own, share = images.new_ones(()), images.new_ones(count)
        if "mixup" in self.tables:
            share = self.tables["mixup"](uniform)
            own = share[:, None, None, None]
        if "cutmix" in self.tables:
            outside, left = _window(self.tables["cutmix"](uniform), x, y, height, width)
            cut = way < 0.5 if "mixup" in self.tables else torch.ones_like(way, dtype=torch.bool)
            own = torch.where(cut[:, None, None, None], outside, own)
            share = torch.where(cut, left, share)
        partner = torch.arange(count, device=images.device).roll(1)
        own = own.to(images.dtype)
        return Mixed(own * images + (1 - own) * images.roll(1, 0), partner, share)


def _window(share: Tensor, x: Tensor, y: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """([N,1,H,W]: 0 in each image's window, else 1; [N]: the share of the image outside of it)."""
    side, inside, sizes = (1 - share).sqrt(), [], []
    for centre, length in ((y, height), (x, width)):
        extent = (side * length).floor()
        start = (centre * length).floor() - (extent / 2).floor()
        end = (start + extent).clamp(max=length)
        start = start.clamp(min=0)
        place = torch.arange(length, device=share.device)
        inside.append((place >= start[:, None]) & (place < end[:, None]))
        sizes.append(end - start)
    outside = ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])
    return outside.to(share.dtype), 1 - sizes[0] * sizes[1] / (height * width)


class Beta:
    """Uniform random numbers to samples of Beta(alpha, alpha): the inverse of its distribution function, by a table.

    The table is of (2 x)^alpha, which is a smooth function of the probability.

    Args:
        alpha: > 0.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        # The integral of the density from 0 to 1/2, by a variable in which the density is finite; the other half is its
        # mirror image.
        power = min(alpha, 1.0)
        place = np.linspace(0, 0.5**power, 8 * _STEPS + 1)
        x = place ** (1 / power)
        density = x ** (alpha - power) * (1 - x) ** (alpha - 1)
        integral = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
        probability = np.linspace(0, 1, _STEPS + 1)
        found = np.interp(probability, integral / integral[-1], place) ** (alpha / power) * 2**alpha
        self.table = torch.from_numpy(found).float()

    def __call__(self, uniform: Tensor) -> Tensor:
        """[N] in [0,1) to [N] in [0,1]."""
        if self.table.device != uniform.device:  # once
            self.table = self.table.to(uniform.device, non_blocking=True)
        place = 2 * _STEPS * torch.minimum(uniform, 1 - uniform)
        low = place.long().clamp(max=_STEPS - 1)
        found = torch.lerp(self.table[low], self.table[low + 1], place - low) ** (1 / self.alpha) / 2
        return torch.where(uniform < 0.5, found, 1 - found)
