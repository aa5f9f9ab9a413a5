"""Match the student's feature map with the teacher's, weighted by sample (DeTT, SimKD).

Lee & Lee 2023 (arXiv 2302.11187); Chen et al. 2022. The student is a transplanted one (`debiaskd.models.transplant`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from debiaskd.models.transplant import match_spatial
from debiaskd.ops.feature_match import feature_match_loss
from debiaskd.terms.state import Setting, State, Term, TermOptions


@dataclass
class MatchOptions(TermOptions):
    """The squared distance of the feature maps.

    Args:
        weighted: by the recipe's sample weights, where it has any (DeTT); all alike otherwise (SimKD).
    """

    weighted: bool = True


class Match(Term):
    needs: ClassVar[frozenset[str]] = frozenset({"student.feature", "teacher.feature"})
    mixes: ClassVar[bool] = True

    def __init__(self, options: MatchOptions, setting: Setting) -> None:
        super().__init__(options)
        self.weighted = options.weighted

    def forward(self, state: State) -> Tensor:
        assert state.student.feature is not None and state.teacher is not None and state.teacher.feature is not None
        student, teacher = match_spatial(state.student.feature, state.teacher.feature)
        shares = state.shares(self.weighted)
        return feature_match_loss(student, teacher, shares, reduction="mean" if shares is None else "sum")
