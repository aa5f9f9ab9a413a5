"""A step's state for tests of loss terms, made of random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import debiaskd as dk
from debiaskd.terms import Draws, Outputs, Ranks, Setting, State

N, K, D, E = 8, 3, 4, 6
SETTING = Setting(num_classes=K, multi_label=False, num_groups=4, student_width=D, teacher_width=E)
TARGET = torch.tensor([0, 1, 2, 0, 0, 1, 0, 1])
CPU = torch.device("cpu")


def ranks(rank: int = 0, world_size: int = 1) -> Ranks:
    found = Ranks()
    found.rank, found.world_size = rank, world_size
    return found


class Meeting(Ranks):
    """One of two ranks in a single process: what it sends is noted down, and what the other one sent comes in."""

    def __init__(self, rank: int, other: list[Tensor] | None) -> None:
        self.rank, self.world_size = rank, 2
        self.sent: list[Tensor] = []
        self.other = None if other is None else iter(other)

    def _meet(self, value: Tensor) -> Tensor:
        self.sent.append(value.detach().clone())
        return self.sent[-1] if self.other is None else next(self.other)

    def sum(self, value: Tensor) -> Tensor:
        return value.detach() + self._meet(value)

    def gather(self, value: Tensor) -> Tensor:
        other = self._meet(value)
        return torch.stack([value, other] if self.rank == 0 else [other, value], 1).flatten(0, 1)


def on_two_ranks(loss: Callable[[Ranks], Tensor]) -> list[Tensor]:
    """What each of two ranks makes of its part, where what they send does not depend on what they get."""
    first = [Meeting(rank, None) for rank in (0, 1)]
    for meeting in first:
        loss(meeting)
    return [loss(Meeting(rank, first[1 - rank].sent)) for rank in (0, 1)]


def of_rank(whole: State, ranks: Ranks) -> State:
    """The images of a step that a rank gets."""
    mine = slice(ranks.rank, None, ranks.world_size)

    def part(given: Any) -> Any:
        if isinstance(given, Outputs):
            return Outputs(*(part(one) for one in given))
        return given[torch.arange(N)[mine]] if isinstance(given, (Tensor, dk.Boxes)) else given

    names = ("images", "target", "boxes", "ignore", "groups", "weight", "student", "teacher")
    return replace(whole, ranks=ranks, seen=None, **{name: part(getattr(whole, name)) for name in names})


def outputs(width: int, dtype: torch.dtype = torch.float32, side: int = 3) -> Outputs:
    feature = torch.randn(N, width, side, side, dtype=dtype)
    return Outputs(feature, feature.mean((2, 3)), 3 * torch.randn(N, K, dtype=dtype))


def state(**changes: Any) -> State:
    made = State(
        images=torch.randn(N, 3, 8, 8),
        target=TARGET,
        boxes=dk.Boxes.from_lists([None] * N),
        ignore=None,
        groups=None,
        weight=None,
        student=outputs(D),
        teacher=outputs(E),
        seen=None,
        epoch=0,
        draws=Draws(0, 0, ranks(), CPU),
        ranks=ranks(),
    )
    return replace(made, **changes)


def contexts(steps: list[State], temperature: float = 4.0) -> Tensor:
    """Sample by sample, as the paper has it; NaN for classes that did not occur."""
    sums, masses = torch.zeros(K, D), torch.zeros(K)
    for step in steps:
        assert step.student.pooled is not None and step.teacher is not None
        for s, u, y in zip(step.student.pooled, step.teacher.logits, step.target):
            p = float((u / temperature).softmax(0)[y])
            sums[y] += p * s
            masses[y] += p
    return sums / masses[:, None]
