"""A step's state for tests of loss terms, made of random numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

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
