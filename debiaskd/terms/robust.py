"""Group DRO: the groups that the model does worst on count most (Sagawa et al. 2020, arXiv 1911.08731)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.terms.state import Setting, State, Term, TermOptions


@dataclass
class GroupDroOptions(TermOptions):
    """Cross-entropy of each group, weighted by `q`, which grows with the group's loss and is renormalised each step.

    Args:
        step_size: of the exponentiated-gradient update of q.
    """

    step_size: float = 0.01


class GroupDro(Term):
    needs: ClassVar[frozenset[str]] = frozenset({"groups"})
    q: Tensor

    def __init__(self, options: GroupDroOptions, setting: Setting) -> None:
        super().__init__(options)
        self.step_size = options.step_size
        self.register_buffer("q", torch.full((setting.num_groups,), 1 / setting.num_groups))

    def forward(self, state: State) -> Tensor:
        assert state.groups is not None
        each = F.cross_entropy(state.student.logits.float(), state.target, reduction="none")
        member = (state.groups == torch.arange(len(self.q), device=each.device)[:, None]).to(each.dtype)
        counts = state.ranks.sum(member.sum(1)).clamp(min=1)
        sums = member @ each
        with torch.no_grad():
            grown = self.q * (self.step_size * state.ranks.sum(sums) / counts).exp()
            self.q.copy_(grown / grown.sum())
        # Gradients are averaged over ranks, and each has its own part of the sums.
        return (self.q.clone() * sums / counts).sum() * state.ranks.world_size
