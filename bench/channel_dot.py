"""Channel dot: what must move is each input once, and in backward the feature's gradient and what it is made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from debiaskd.ops.channel_dot import channel_dot, eager

from .harness import Case
from .report import Goal

MAIN = "64×2048×7×7"
CLOSED = f"{MAIN}, closed form"
TINY = "1×4×2×2, closed form"
LARGE = "128×256×56×56"
GOALS = (Goal(MAIN, "cpp", "eager", 1.2), Goal(CLOSED, "cpp", "eager", 1.5))


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    if quick:
        yield case("2×8×3×3", (2, 8, 3, 3), device)
        yield case("2×8×3×3, closed form", (2, 8, 3, 3), device, constant=True)
        return
    for constant in (False, True):
        suffix = ", closed form" if constant else ""
        yield case(MAIN + suffix, (64, 2048, 7, 7), device, constant=constant)
        yield case(
            f"{MAIN}, channels last{suffix}",
            (64, 2048, 7, 7),
            device,
            constant=constant,
            memory_format=torch.channels_last,
        )
        yield case(f"{MAIN}, bfloat16{suffix}", (64, 2048, 7, 7), device, constant=constant, dtype=torch.bfloat16)
        yield case(f"16×256×56×56{suffix}", (16, 256, 56, 56), device, constant=constant)
    if device == "cuda":
        yield case(LARGE, (128, 256, 56, 56), device)
    yield tiny(device)


def case(
    name: str,
    shape: tuple[int, int, int, int],
    device: str,
    *,
    constant: bool = False,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Case:
    """The gradient for the feature; `constant` gives one number a channel, as the closed form does."""
    generator = torch.Generator().manual_seed(0)

    def values() -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).contiguous(memory_format=memory_format)

    feature = values().requires_grad_()
    gradient = torch.randn(shape[:2], generator=generator).to(device, dtype) if constant else values()
    # What follows the map is a loss of it; a weighted sum costs next to nothing, and its gradient is not constant.
    weight = torch.randn(shape[0], *shape[2:], generator=generator).to(device)
    size = feature.numel() * feature.element_size()
    return Case(
        op="channel_dot",
        name=name,
        leaf=feature,
        eager=lambda a: (eager(gradient, a) * weight).sum(),
        public=lambda a: (channel_dot(gradient, a) * weight).sum(),
        reference=lambda a: (eager(gradient.double(), a) * weight).sum(),
        forward_bytes=size if constant else 2 * size,
        backward_bytes=size if constant else 2 * size,
        references={
            "einsum": lambda a: (
                torch.einsum("nc,nchw->nhw" if constant else "nchw,nchw->nhw", gradient, a) * weight
            ).sum()
        },
    )


def tiny(device: str) -> Case:
    """Nothing but the cost of a call."""
    small = case(TINY, (1, 4, 2, 2), device, constant=True)
    small.references["cheapest"] = small.references.pop("einsum")
    return small
