"""One small call of each op, in each of its kinds, for tests of what all ops have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import attribution, normal, uniform

import debiaskd as dk


@dataclass(frozen=True)
class Call:
    """An op on inputs of its own; the first input gets the gradient."""

    name: str
    op: str
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    run: Callable[..., torch.Tensor]

    def make(self, device="cuda"):
        first, *others = (x.to(device) for x in self.inputs())
        return first.requires_grad_(), *others


def boxes(count: int = 8) -> dk.Boxes:
    return dk.Boxes.from_lists([[[3, 2, 40, 50], [20, 5, 60, 30]], [], None, [[0, 0, 64, 64]]] * (count // 4))


def localization(kind: str, size: tuple[int, int] | None, pixels: int) -> Call:
    def inputs():
        packed = boxes()
        return attribution(kind, 8, pixels, pixels), packed.coords, packed.offsets, packed.annotated

    def run(maps, coords, offsets, annotated):
        found = dk.Boxes(coords, offsets, annotated=annotated)
        return dk.localization_loss(maps, found, kind=kind, size=size)

    return Call(f"localization-{kind}-{pixels}", "localization", inputs, run)


def labels(samples: int) -> torch.Tensor:
    return torch.arange(samples) % 5


CALLS = [
    Call(
        "feature_match",
        "feature_match",
        lambda: (normal(16, 64, 7, 7), normal(16, 64, 7, 7, seed=1), uniform(16)),
        dk.feature_match_loss,
    ),
    Call(
        "feature_match-normalize",
        "feature_match",
        lambda: (normal(16, 64, 7, 7), normal(16, 64, 7, 7, seed=1), uniform(16)),
        lambda s, t, w: dk.feature_match_loss(s, t, w, normalize=True),
    ),
    Call(
        "feature_match-float16",
        "feature_match",
        lambda: (normal(16, 64, 7, 7).half(), normal(16, 64, 7, 7, seed=1).half()),
        dk.feature_match_loss,
    ),
    *(localization(kind, None, 64) for kind in ("energy", "l1", "ppce", "rrr")),
    *(localization(kind, (64, 64), 7) for kind in ("energy", "rrr")),
    *(
        Call(
            f"map_cosine-{side}",
            "map_cosine",
            lambda side=side: (normal(8, side, side), normal(8, 64, 64, seed=1), uniform(8)),
            dk.map_cosine_loss,
        )
        for side in (64, 7)
    ),
    Call(
        "channel_dot",
        "channel_dot",
        lambda: (normal(8, 32, 7, 7), normal(8, 32, 7, 7, seed=1)),
        lambda g, a: dk.channel_dot(g, a).sum(),
    ),
    Call(
        "class_relation",
        "class_relation",
        lambda: (normal(32, 64), normal(32, 48, seed=1), labels(32)),
        dk.class_relation_loss,
    ),
    *(
        Call(
            f"backdoor-{mode}",
            "backdoor",
            lambda: (normal(16, 24), normal(16, 10, seed=1), normal(10, 8, seed=2), normal(10, 32, seed=3)),
            lambda f, z, c, w, mode=mode: dk.backdoor_logits(f, z, c, w, mode=mode).square().sum(),
        )
        for mode in ("nwgm", "exact")
    ),
]


def loss_and_gradient(call, inputs):
    loss = call.run(*inputs)
    return loss.detach(), torch.autograd.grad(loss, inputs[0])[0]
