"""Faithfulness of attribution maps: the deletion curve (Petsiuk et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.utils import checks


class Deletion(NamedTuple):
    """Areas under the curve of the target class's probability as pixels are blanked, [N] each, in [0,1].

    by_map: the pixels of the largest attribution first. at_random: in a random order. A map is faithful if the first is
        clearly below the second.
    """

    by_map: Tensor
    at_random: Tensor


@torch.no_grad()
def deletion(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    *,
    steps: int = 16,
    blank: float | Tensor = 0.0,
    seed: int = 0,
) -> Deletion:
    """Blank pixels in the order of the maps and in random order, and integrate the target's probability.

    Args:
        model: images [N,C,H,W] to logits [N,K], in evaluation mode.
        images: [N,C,H,W], as the model expects them.
        maps: [N,h,w] attributions of the target class; resized bilinearly to H,W.
        target: int64 [N], the class of each map.
        steps: number of steps, each of which blanks equally many pixels; 2 · steps + 1 forward passes.
        blank: value of a blanked pixel, a number or [C]; 0 is the mean colour of images normalised by their mean.
        seed: seed of the random order, which is the same for all images.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> import torch
        >>> from debiaskd.metrics import deletion
        >>> images = torch.zeros(1, 1, 4, 4)
        >>> images[..., 0, 0] = 9.0  # the pixel that the model looks at
        >>> model = lambda x: torch.stack([x[:, 0, 0, 0], torch.zeros(len(x))], 1)
        >>> found = deletion(model, images, images[:, 0], torch.tensor([0]))
        >>> bool(found.by_map < found.at_random)
        True
    """
    checks.rank("images", checks.floating("images", images), "[N,C,H,W]")
    checks.rank("maps", checks.floating("maps", maps), "[N,h,w]")
    checks.shape("maps", maps, "[N,h,w]", [len(images), *maps.shape[1:]])
    checks.shape("target", checks.tensor("target", target), "[N]", [len(images)])
    if checks.integer("steps", steps) < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    size = (images.shape[2], images.shape[3])
    wide = maps if maps.shape[1:] == size else _upsampled(maps, size)
    order = wide.flatten(1).argsort(dim=1, descending=True, stable=True)
    shuffled = torch.randperm(order.shape[1], generator=torch.Generator().manual_seed(seed)).to(order.device)
    value = torch.as_tensor(blank, dtype=images.dtype, device=images.device).reshape(-1, 1, 1)
    whole = _probability(model, images, target)
    areas = []
    for ranking in (order, shuffled.expand_as(order)):
        rank = torch.empty_like(ranking).scatter(
            1, ranking, torch.arange(ranking.shape[1], device=ranking.device).expand_as(ranking)
        )
        curve = [whole]
        for step in range(1, steps + 1):
            gone = (rank < round(step * ranking.shape[1] / steps)).view(-1, 1, *size)
            curve.append(_probability(model, torch.where(gone, value, images), target))
        areas.append(torch.trapezoid(torch.stack(curve, 1), dx=1 / steps, dim=1))
    return Deletion(*areas)


def _upsampled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]


def _probability(model: Callable[[Tensor], Tensor], images: Tensor, target: Tensor) -> Tensor:
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must give logits [N,K] of N={len(images)} images, got {got}")
    return logits.float().softmax(1).gather(1, target[:, None])[:, 0]
