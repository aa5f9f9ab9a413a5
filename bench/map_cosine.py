"""Map cosines: what must move is both maps once and the student's gradient once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.ops.map_cosine import eager, map_cosine_loss

from .harness import Case
from .report import Goal

MAIN = "64×7×7 to 224×224"
TINY = "1×4×4 to 4×4"
GOALS = (
    Goal(MAIN, "cpp", "eager", 5.0),
    Goal(MAIN, "cpp", "plain", 5.0),
    *(Goal(MAIN, "triton", name, 3) for name in ("eager", "loop")),
)


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    if quick:
        yield case("2×2×2 to 8×8", (2, 2, 2), (8, 8), device)
        yield case("2×8×8 to 2×2", (2, 8, 8), (2, 2), device)
        return
    full = (224, 224)
    yield case(MAIN, (64, 7, 7), full, device)
    yield case("64×224×224 to 7×7", (64, *full), (7, 7), device)
    yield case("64×224×224 to 224×224", (64, *full), full, device)
    yield case("64×14×14 to 7×7", (64, 14, 14), (7, 7), device)
    yield case("64×7×7 to 7×7", (64, 7, 7), (7, 7), device)
    yield case(f"{MAIN}, bfloat16", (64, 7, 7), full, device, dtype=torch.bfloat16)
    yield case(TINY, (1, 4, 4), (4, 4), device)


def case(
    name: str,
    shape: tuple[int, int, int],
    size: tuple[int, int],
    device: str,
    *,
    dtype: torch.dtype = torch.float32,
) -> Case:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(s, generator=generator).to(device, dtype) for s in (shape, (shape[0], *size)))
    leaf = student.requires_grad_()
    own, other = (x.numel() * x.element_size() for x in (leaf, teacher))
    return Case(
        op="map_cosine",
        name=name,
        leaf=leaf,
        eager=lambda s: eager(s, teacher, None, "mean"),
        public=lambda s: map_cosine_loss(s, teacher),
        reference=lambda s: eager(s, teacher.double(), None, "mean"),
        forward_bytes=own + other,
        backward_bytes=own,  # with the values of forward at hand
        references={"plain": lambda s: plain(s, teacher), "loop": lambda s: loop(s, teacher)},
    )


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """As one writes it first: the smaller map interpolated, then PyTorch's own cosine of vectors."""
    teacher = teacher.to(student.dtype)
    size = [max(student.shape[axis], teacher.shape[axis]) for axis in (1, 2)]
    maps = [
        x if list(x.shape[1:]) == size else F.interpolate(x[:, None], size, mode="bilinear")[:, 0]
        for x in (student, teacher)
    ]
    return (1 - F.cosine_similarity(maps[0].flatten(1), maps[1].flatten(1), dim=1)).mean()


def loop(student: Tensor, teacher: Tensor) -> Tensor:
    """One image after the other, as research code explains one image at a time."""
    return torch.stack([plain(s[None], t[None]) for s, t in zip(student, teacher)]).mean()
