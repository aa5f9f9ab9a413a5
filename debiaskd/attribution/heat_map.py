"""Scale attribution maps for display."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def heat_map(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample maps to an image's size and scale their positive part to [0,1].

    Each map is divided by its 99.5 % quantile, and what exceeds it is clipped: most positions of a map of the image
    itself are close to 0, and a single outlier would leave the rest invisible.

    Args:
        maps: floating [N,h,w].
        size: (H, W) of the images.

    Returns:
        float32 [N,H,W] on the CPU; all 0 where a map has no positive part at its quantile.

    Example:
        >>> import torch
        >>> from debiaskd.attribution.heat_map import heat_map
        >>> heat_map(torch.tensor([[[-1.0, 4.0]]]), (1, 2))
        tensor([[[0., 1.]]])
    """
    resized = F.interpolate(maps[:, None].detach().float(), size, mode="bilinear")[:, 0].clamp(min=0).cpu()
    strongest = resized.flatten(1).quantile(0.995, dim=1)[:, None, None]
    return (resized / strongest.where(strongest > 0, strongest.new_ones(()))).clamp(max=1)
