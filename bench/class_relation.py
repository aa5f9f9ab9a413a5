"""Class relations: what must move is student and teacher once and the gradient once; the rest is arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.ops.class_relation import class_relation_loss, eager

from .harness import Case
from .report import Goal

MAIN = "256×2048, 100 classes"
TINY = "4×8, 2 classes"
GOALS = (Goal(MAIN, "cpp", "eager", 4.0), Goal(MAIN, "cpp", "loop", 30.0))


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    if quick:
        yield case("12×8, 3 classes", 12, 8, 3, device)
        return
    yield case(MAIN, 256, 2048, 100, device)
    yield case(f"{MAIN}, upstream 0.5", 256, 2048, 100, device, upstream=0.5)
    yield case(f"{MAIN}, bfloat16", 256, 2048, 100, device, dtype=torch.bfloat16)
    yield case("256×2048, 10 classes", 256, 2048, 10, device)
    yield case("256×2048, 1 class", 256, 2048, 1, device)
    yield case("64×64, 10 classes", 64, 64, 10, device)
    yield case("1024×512, 1000 classes", 1024, 512, 1000, device)
    yield case(TINY, 4, 8, 2, device)


def case(
    name: str,
    samples: int,
    width: int,
    classes: int,
    device: str,
    *,
    dtype: torch.dtype = torch.float32,
    upstream: float = 1.0,
) -> Case:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(samples, width, generator=generator).to(device, dtype).requires_grad_()
    teacher = torch.randn(samples, width, generator=generator).to(device, dtype)
    labels = torch.randint(0, classes, (samples,), generator=generator).to(device)
    size = student.numel() * student.element_size()
    return Case(
        op="class_relation",
        name=name,
        leaf=student,
        eager=lambda s: eager(s, teacher, labels),
        public=lambda s: class_relation_loss(s, teacher, labels),
        reference=lambda s: eager(s, teacher.double(), labels),
        forward_bytes=2 * size,
        backward_bytes=size,  # with the cosines of forward at hand
        references={"loop": lambda s: loop(s, teacher, labels, classes)},
        upstream=upstream,
    )


def loop(student: Tensor, teacher: Tensor, labels: Tensor, classes: int) -> Tensor:
    """One class after the other: how research code is usually written."""
    wide = torch.promote_types(student.dtype, torch.float32)
    losses = []
    for k in range(classes):
        chosen = labels == k
        count = int(chosen.sum())
        if count < 2:
            continue
        s, t = (F.normalize(x[chosen].to(wide)) for x in (student, teacher))
        losses.append((t @ t.T - s @ s.T).norm().square() / count**2)
    return torch.stack(losses).mean()
