"""CID's intervention: a second head on each sample's features and the contexts of all classes.

    start - 1    this epoch builds the contexts: each class's mean student feature, weighted by the teacher's certainty
    start ...    cross-entropy of the adjusted logits; the contexts are rebuilt in every epoch

The head and its contexts are needed at test time and are part of the model that is saved: `Intervened`.
Deng & Zhang 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from debiaskd.ops.backdoor import backdoor_logits
from debiaskd.ops.class_context import class_context
from debiaskd.terms.state import Ranks, Setting, State, Term, TermOptions


@dataclass
class BackdoorOptions(TermOptions):
    """Cross-entropy of logits adjusted for the context.

    Args:
        mode: "nwgm", the paper's code: the mean context enters the head; "exact": the mean of the probabilities.
        temperature: of the softmax that says how probable each context is, and how sure the teacher is.
        mix: of the contexts of the epoch before that stay: mix · old + (1 - mix) · new.
        weighted: the cross-entropy, by the recipe's sample weights; the contexts are not.
    """

    start: int = 20
    mode: Literal["nwgm", "exact"] = "nwgm"
    temperature: float = 4.0
    mix: float = 0.0
    weighted: bool = False


class Intervention(nn.Module):
    """The second head, [N,D] features and [N,K] logits to adjusted logits [N,K]; the contexts [K,D] are a buffer."""

    learned_buffers: ClassVar[tuple[str, ...]] = ("context",)
    context: Tensor

    def __init__(self, width: int, num_classes: int, mode: str, temperature: float) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * width, num_classes)
        self.mode, self.temperature = mode, temperature
        self.register_buffer("context", torch.zeros(num_classes, width))

    def forward(self, feature: Tensor, logits: Tensor) -> Tensor:
        return backdoor_logits(
            feature,
            logits,
            self.context,
            self.fc.weight,
            self.fc.bias,
            temperature=self.temperature,
            mode=self.mode,
        )


class Backdoor(Term):
    needs: ClassVar[frozenset[str]] = frozenset({"student.pooled", "teacher.logits"})
    own: ClassVar[frozenset[str]] = frozenset({"sums", "masses"})
    sums: Tensor
    masses: Tensor
    built: Tensor

    def __init__(self, options: BackdoorOptions, setting: Setting) -> None:
        super().__init__(options)
        width, classes = setting.student_width, setting.num_classes
        self.head = Intervention(width, classes, options.mode, options.temperature)
        self.mix, self.temperature, self.weighted = options.mix, options.temperature, options.weighted
        self.register_buffer("sums", torch.zeros(classes, width))
        self.register_buffer("masses", torch.zeros(classes))
        self.register_buffer("built", torch.tensor(False))

    def active(self, epoch: int) -> bool:
        return self.options.factor(epoch + 1) > 0

    def forward(self, state: State) -> Tensor:
        assert state.student.pooled is not None and state.teacher is not None
        feature, logits = state.student.pooled, state.student.logits
        sums, masses = class_context(
            feature.detach(),
            state.teacher.logits,
            state.target,
            len(self.masses),
            temperature=self.temperature,
        )
        self.sums += sums
        self.masses += masses
        if not self.options.factor(state.epoch):
            return logits.new_zeros(())
        each = F.cross_entropy(self.head(feature, logits), state.target, reduction="none")
        return state.mean(each, self.weighted)

    def end_epoch(self, epoch: int, ranks: Ranks) -> None:
        if not self.active(epoch):
            return
        sums, masses = ranks.sum(self.sums), ranks.sum(self.masses)
        found = (sums / masses[:, None]).to(self.head.context.dtype)
        mixed = torch.where(self.built, self.mix * self.head.context + (1 - self.mix) * found, found)
        # A class that did not occur keeps what it had.
        self.head.context.copy_(torch.where(masses[:, None] > 0, mixed, self.head.context))
        self.built.fill_(True)
        self.sums.zero_()
        self.masses.zero_()

    def deployed(self, student: nn.Module) -> nn.Module:
        return Intervened(student, self.head) if bool(self.built) else student


class Intervened(nn.Module):
    """A student with CID's second head: `forward(images)` gives the adjusted logits.

    Args:
        student: speaks timm's protocol (`forward_features`, `forward_head`, `get_classifier`).
        intervention: trained with it.
    """

    def __init__(self, student: nn.Module, intervention: Intervention) -> None:
        super().__init__()
        self.student, self.intervention = student, intervention
        self.num_classes = intervention.fc.out_features

    def get_classifier(self) -> Any:
        inner: Any = self.student
        return inner.get_classifier()

    def forward_features(self, images: Tensor) -> Tensor:
        inner: Any = self.student
        found: Tensor = inner.forward_features(images)
        return found

    def forward_head(self, feature: Tensor, pre_logits: bool = False) -> Tensor:
        inner: Any = self.student
        pooled: Tensor = inner.forward_head(feature, pre_logits=True)
        if pre_logits:
            return pooled
        return self.intervention(pooled, inner.forward_head(feature))  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))
