"""Draw attribution maps over images, and images as data URIs."""

from __future__ import annotations

import base64
import io

import torch
from torch import Tensor

HOT = (255.0, 96.0, 0.0)


def glowing(images: Tensor, maps: Tensor) -> Tensor:
    """uint8 [E,3,S,S]: the images, uint8 [E,3,S,S], in grey, and on them the glow of maps [E,S,S] in 0..1."""
    grey = images.float().mean(1, keepdim=True).expand(-1, 3, -1, -1) * 0.8
    strength = maps[:, None] * 0.85
    return (grey * (1 - strength) + torch.tensor(HOT)[:, None, None] * strength).round().to(torch.uint8)


def data_uri(image: Tensor, side: int | None = None) -> str:
    """A PNG of uint8 [3,H,W], made smaller where that is larger than `side`."""
    from PIL import Image

    buffer = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if side is not None:
        picture.thumbnail((side, side))
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
