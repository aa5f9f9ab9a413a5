"""Find which features of a teacher its head reads: its last feature map, or a vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from debiaskd.models.cut import cut, last_map
from debiaskd.models.heads import Head, map_head, token_head
from debiaskd.models.last_layers import ReadInputs
from debiaskd.models.layouts import LayoutError
from debiaskd.models.modules import has_protocol, share
from debiaskd.models.trial_inputs import input_of, runnable

#: Whether a teacher's feature map is matched, or the vector that its last layers read.
Level: TypeAlias = Literal["map", "token"]


@dataclass
class Source:
    """A teacher's head, and what it reads.

    Attributes:
        head: frozen.
        body: from images to what is matched; None where it is not needed.
        level: "map" or "token".
        channels: width of what is matched.
        nonnegative: whether no value of it lies below zero.
    """

    head: Head
    body: nn.Module | None
    level: Level
    channels: int
    nonnegative: bool


def find_source(teacher: nn.Module, layer: str | None, head: str | None, example: Tensor | None) -> Source:
    """At map level if the logits follow from the last feature map, else at token level; see `debiaskd.models.heads`."""
    images, named = None, layer is not None
    runnable("teacher", teacher)
    try:
        if not named and not has_protocol(teacher):
            layer = last_map("teacher", teacher, example)
        made = cut("teacher", teacher, layer, example)
        images = made.images
        found = map_head(made, head)
        if found is not None:
            return Source(found, made.body, "map", made.channels, made.nonnegative)
    except LayoutError:  # lists of features, say, which the head does not need
        if named:
            raise
    if images is None:
        images = input_of("teacher", teacher, example)
    found, names = token_head("teacher", teacher, images, head)
    body = ReadInputs(share(teacher), names).eval()
    with torch.no_grad():
        z = body(images)
    if not bool(torch.isfinite(z).all()):
        raise ValueError("teacher must give finite features, got NaN or infinity on random input")
    return Source(found, body, "token", found.in_features, bool((z >= 0).all()))
