"""Group DRO: weight the groups with the highest losses most (Sagawa et al. 2020, arXiv 1911.08731).

The weights of groups grow with the step's group losses before its gradient is taken (algorithm 1). Where a step has
several passes, the losses of all of them have to be known before the first backward pass, so that each of them runs
forward twice: the first time without gradients, dropout and batch statistics being the same both times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.terms.state import Setting, State, StepInputs, Term, TermOptions


@dataclass
class GroupDroOptions(TermOptions):
    """Cross-entropy of each group, weighted by `q`, which grows with the group's loss and is renormalised each step.

    With `schedule.accumulate` > 1 the student runs forward once more for each pass.

    Args:
        step_size: of the exponentiated-gradient update of q.
    """

    step_size: float = 0.01


class GroupDro(Term):
    needs: ClassVar[frozenset[str]] = frozenset({"groups"})
    tallied = "logits"
    q: Tensor

    def __init__(self, options: GroupDroOptions, setting: Setting) -> None:
        super().__init__(options)
        self.step_size = options.step_size
        self.register_buffer("q", torch.full((setting.num_groups,), 1 / setting.num_groups))

    def tally(self, inputs: StepInputs, logits: Tensor | None) -> dict[str, Tensor]:
        assert logits is not None
        counts, sums = self._by_group(inputs, logits)
        return {"group_dro.counts": counts, "group_dro.sums": sums}

    def forward(self, state: State) -> Tensor:
        own, sums = self._by_group(state, state.student.logits)
        counts = state.total("group_dro.counts", own).clamp(min=1)
        if state.number == 0:
            with torch.no_grad():
                grown = self.q * (self.step_size * state.total("group_dro.sums", sums) / counts).exp()
                self.q.copy_(grown / grown.sum())
        # Parts are averaged, and each has its own part of the sums.
        return (self.q.clone() * sums / counts).sum() * state.parts

    def _by_group(self, inputs: StepInputs, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[G] numbers of samples, and [G] sums of their losses."""
        assert inputs.groups is not None
        each = F.cross_entropy(logits.float(), inputs.target, reduction="none")
        member = (inputs.groups == torch.arange(len(self.q), device=each.device)[:, None]).to(each.dtype)
        return member.sum(1), member @ each
