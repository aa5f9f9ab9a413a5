"""Example pictures for a report: what each method sees in the same few pictures."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field

import torch
from torch import Tensor

from debiaskd.attribution.heat_map import heat_map
from debiaskd.data.sources import digits

#: How many pictures of each group: the groups that contradict the shortcut are where methods differ.
SHOWN = (1, 2, 2, 1)
HOT = (255.0, 96.0, 0.0)


@dataclass
class Gallery:
    """A few pictures with their boxes, and what each method makes of them.

    Attributes:
        seed: whose data set and models these are.
        index: int64 [E], which pictures of the split.
        images: uint8 [E,3,S,S].
        boxes: [E] lists (x0, y0, x1, y1).
        labels, groups: class and group of each.
        maps: method to float [E,S,S], the positive part of the attribution, at most 1.
        predictions: method to the [E] predicted classes.
    """

    seed: int
    index: Tensor
    images: Tensor
    boxes: list[list[int]]
    labels: list[int]
    groups: list[int]
    maps: dict[str, Tensor] = field(default_factory=dict)
    predictions: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def choose(cls, pictures: digits.Pictures, seed: int) -> Gallery:
        """The first pictures of each group: nobody picked the ones that look best."""
        parts = [(pictures.groups == group).nonzero()[:count, 0] for group, count in enumerate(SHOWN)]
        index = torch.cat(parts)
        return cls(
            seed,
            index,
            pictures.images[index],
            pictures.boxes[index].coords.tolist(),
            pictures.labels[index].tolist(),
            pictures.groups[index].tolist(),
        )

    def add(self, method: str, maps: Tensor, logits: Tensor) -> None:
        """`maps` [N,h,w] and `logits` [N,K] of the whole split."""
        self.maps[method] = heat_map(maps[self.index], (self.images.shape[-2], self.images.shape[-1]))
        self.predictions[method] = logits[self.index].argmax(1).tolist()

    def pictures(self) -> list[str]:
        """Each picture as a data URI."""
        return [data_uri(image) for image in self.images]

    def overlays(self, method: str) -> list[str]:
        """Each picture in grey with the method's attribution glowing on it, as a data URI."""
        return [data_uri(image) for image in glowing(self.images, self.maps[method])]

    def titles(self) -> list[str]:
        """Each picture's group in words."""
        return [digits.GROUPS[group] for group in self.groups]

    def predicted(self, method: str) -> list[str]:
        """The predicted classes in words."""
        return [digits.LABELS[label] for label in self.predictions[method]]


def glowing(images: Tensor, maps: Tensor) -> Tensor:
    """uint8 [E,3,S,S]: the pictures, uint8 [E,3,S,S], in grey, and on them the glow of maps [E,S,S] in 0..1."""
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
