"""Feature matching: what must move is student and teacher once and the gradient once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.ops.feature_match import eager, feature_match_loss

from .harness import Case
from .report import Goal

MAIN = "64×2048×7×7"
TINY = "1×4×4"
LARGE = "256×2048×14×14"
GOALS = (
    Goal(MAIN, "cpp", "eager", 9.0),
    Goal(MAIN, "cpp", "compile", 2.3),
    *(Goal(f"{LARGE}, float32", name, "compile", 1.3) for name in ("cuda", "triton")),
    *(Goal(MAIN, name, "loop", 100) for name in ("cuda", "triton")),
)


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    if quick:
        yield case("2×8×3×3", (2, 8, 3, 3), device)
        yield case("4×16 normalize", (4, 16), device, normalize=True)
        return
    yield case(MAIN, (64, 2048, 7, 7), device)
    yield case(f"{MAIN}, upstream 0.5", (64, 2048, 7, 7), device, upstream=0.5)
    yield case(f"{MAIN}, weighted", (64, 2048, 7, 7), device, weighted=True)
    yield case(f"{MAIN}, channels last", (64, 2048, 7, 7), device, memory_format=torch.channels_last)
    yield case(f"{MAIN}, bfloat16", (64, 2048, 7, 7), device, dtype=torch.bfloat16)
    if device == "cuda":
        for dtype in (torch.float32, torch.bfloat16):
            yield case(f"{LARGE}, {str(dtype).removeprefix('torch.')}", (256, 2048, 14, 14), device, dtype=dtype)
    yield case("8×512×7×7", (8, 512, 7, 7), device)
    yield case("256×2048, normalize", (256, 2048), device, normalize=True)
    yield tiny(device)


def case(
    name: str,
    shape: tuple[int, ...],
    device: str,
    *,
    dtype: torch.dtype = torch.float32,
    normalize: bool = False,
    weighted: bool = False,
    upstream: float = 1.0,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def features() -> Tensor:
        values = torch.randn(shape, generator=generator).to(device, dtype)
        return values.contiguous(memory_format=memory_format)

    student, teacher = features().requires_grad_(), features()
    weight = torch.where(torch.arange(shape[0], device=device) % 4 == 0, 50.0, 1.0) if weighted else None
    size = student.numel() * student.element_size()
    references = {}
    if not normalize and weight is None:
        references["plain"] = lambda s: plain(s, teacher)
        references["loop"] = lambda s: loop(s, teacher)
    return Case(
        op="feature_match",
        name=name,
        leaf=student,
        eager=lambda s: eager(s, teacher, weight, normalize, "mean"),
        public=lambda s: feature_match_loss(s, teacher, weight, normalize=normalize),
        reference=lambda s: eager(s, teacher.double(), None if weight is None else weight.double(), normalize, "mean"),
        forward_bytes=2 * size,
        backward_bytes=size,  # with the values of forward at hand: 3 passes for both
        upstream=upstream,
        references=references,
    )


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """As one writes it first: a power, an average over each sample, an average over samples."""
    teacher = teacher.to(student.dtype)
    return ((student - teacher) ** 2).flatten(1).mean(1).mean()


def loop(student: Tensor, teacher: Tensor) -> Tensor:
    """One sample after the other: how research code is usually written where samples are weighted."""
    teacher = teacher.to(student.dtype)
    return torch.stack([F.mse_loss(s, t) for s, t in zip(student, teacher)]).mean()


def tiny(device: str) -> Case:
    """Nothing but the cost of a call. The cheapest form in PyTorch is its own fused loss."""
    small = case(TINY, (1, 4, 4), device)
    teacher = torch.zeros_like(small.leaf.detach())
    small.eager = lambda s: eager(s, teacher, None, False, "mean")
    small.public = lambda s: feature_match_loss(s, teacher)
    small.reference = lambda s: eager(s, teacher.double(), None, False, "mean")
    small.references = {"cheapest": lambda s: F.mse_loss(s, teacher)}
    return small
