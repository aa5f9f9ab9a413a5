"""Supervised loss: cross-entropy, or binary cross-entropy where an image may have several classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from debiaskd.terms.state import Setting, State, Term, TermOptions


@dataclass
class SupervisedOptions(TermOptions):
    """The labels' cross-entropy; binary with logits where an image may show several classes.

    Args:
        weighted: by the recipe's sample weights.
        label_smoothing: in [0,1), for one class an image.
    """

    weighted: bool = False
    label_smoothing: float = 0.0


class Supervised(Term):
    mixes: ClassVar[bool] = True

    def __init__(self, options: SupervisedOptions, setting: Setting) -> None:
        super().__init__(options)
        self.weighted, self.smoothing = options.weighted, options.label_smoothing

    def forward(self, state: State) -> Tensor:
        logits = state.student.logits.float()
        if state.target.is_floating_point():
            each = F.binary_cross_entropy_with_logits(logits, state.target, reduction="none").mean(1)
        else:
            smoothing = self.smoothing
            each = state.over_targets(lambda y: F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing))
        return state.mean(each, self.weighted)
