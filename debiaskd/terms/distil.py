"""Distillation losses: softened logits, pooled features, relations within a class.

Hinton et al. 2015 (kd); Deng & Zhang 2021, CID (sample, relation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from debiaskd.ops.class_relation import class_relation_loss
from debiaskd.ops.feature_match import feature_match_loss
from debiaskd.ops.kd import kd_loss
from debiaskd.terms.state import Setting, State, Term, TermOptions


@dataclass
class KdOptions(TermOptions):
    """T² times the Kullback-Leibler divergence of the softened predictions.

    Args:
        temperature: T > 0.
        weighted: by the recipe's sample weights.
    """

    temperature: float = 4.0
    weighted: bool = False


class Kd(Term):
    needs: ClassVar[frozenset[str]] = frozenset({"teacher.logits"})
    mixes: ClassVar[bool] = True

    def __init__(self, options: KdOptions, setting: Setting) -> None:
        super().__init__(options)
        self.temperature, self.weighted = options.temperature, options.weighted

    def forward(self, state: State) -> Tensor:
        assert state.teacher is not None
        student, teacher, shares = state.student.logits, state.teacher.logits, state.shares(self.weighted)
        reduction = "mean" if shares is None else "sum"
        return kd_loss(student, teacher, shares, temperature=self.temperature, reduction=reduction)


@dataclass
class SampleOptions(TermOptions):
    """CID's sample loss, ‖R s - t‖² / ‖t‖² of pooled features, with R linear, trained, and without weight decay.

    Args:
        weighted: by the recipe's sample weights.
    """

    weighted: bool = False


class Sample(Term):
    needs: ClassVar[frozenset[str]] = frozenset({"student.pooled", "teacher.pooled"})
    no_weight_decay: ClassVar[bool] = True
    mixes: ClassVar[bool] = True

    def __init__(self, options: SampleOptions, setting: Setting) -> None:
        super().__init__(options)
        assert setting.teacher_width is not None
        self.regressor = nn.Linear(setting.student_width, setting.teacher_width)
        self.weighted = options.weighted

    def forward(self, state: State) -> Tensor:
        assert state.student.pooled is not None and state.teacher is not None and state.teacher.pooled is not None
        projected = self.regressor(state.student.pooled)
        teacher, shares = state.teacher.pooled.to(projected.dtype), state.shares(self.weighted)
        reduction = "mean" if shares is None else "sum"
        return feature_match_loss(projected, teacher, shares, normalize=True, reduction=reduction)


@dataclass
class RelationOptions(TermOptions):
    """CID's class loss: cosines between samples of a class, student's against teacher's, over all ranks' samples.

    Pairs are counted within a forward pass. `schedule.accumulate` therefore changes this loss, as no other: a step of
    several passes has the mean of their losses, over the fewer pairs that meet in one.
    """


class Relation(Term):
    needs: ClassVar[frozenset[str]] = frozenset({"student.pooled", "teacher.pooled"})

    def __init__(self, options: RelationOptions, setting: Setting) -> None:
        super().__init__(options)

    def forward(self, state: State) -> Tensor:
        assert state.student.pooled is not None and state.teacher is not None and state.teacher.pooled is not None
        student, teacher, labels = (
            state.ranks.gather(part) for part in (state.student.pooled, state.teacher.pooled, state.target)
        )
        return class_relation_loss(student, teacher.to(student.dtype), labels)
