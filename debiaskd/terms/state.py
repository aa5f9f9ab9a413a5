"""The inputs of a training step, and the base class of loss terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from debiaskd.attribution.attributor import Seen
from debiaskd.boxes import Boxes


class Outputs(NamedTuple):
    """A model's outputs for N images; None where no term needs them.

    feature: [N,C,H,W] the last feature map. pooled: [N,D] what the last linear layer reads. logits: [N,K].
    explanation: [N,h,w] or [N,C,H,W], a teacher's attribution maps; explained: int64 [N], the classes that they are of.
    """

    feature: Tensor | None
    pooled: Tensor | None
    logits: Tensor
    explanation: Tensor | None = None
    explained: Tensor | None = None


class Ranks:
    """The processes that train together; a single one unless torch.distributed is initialised."""

    def __init__(self) -> None:
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if together else 0
        self.world_size = torch.distributed.get_world_size() if together else 1

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, the same on each; detached."""
        value = value.detach().clone()
        if self.world_size > 1:
            torch.distributed.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        return self.sum(value) / self.world_size

    def gather(self, value: Tensor) -> Tensor:
        """[N,...] of every rank as [world_size·N,...], in the order that one process would have read them.

        Gradients of all ranks' uses come back to the rank whose value it was.
        """
        if self.world_size == 1:
            return value
        if value.requires_grad:
            from torch.distributed.nn.functional import all_gather

            parts = list(all_gather(value))
        else:
            parts = [torch.empty_like(value) for _ in range(self.world_size)]
            torch.distributed.all_gather(parts, value.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)


class Draws:
    """A step's random numbers: of the seed, the step and a sample's place in the step alone.

    The samples of a step are split into equal passes, and ranks take turns in the samples of each pass. Random numbers
    are split in the same way, so that a sample gets the same ones in however many passes and ranks its step is run.
    Nothing has to be remembered for a run to go on where it was interrupted.

    Args:
        seed, step: of which the numbers are a function.
        ranks, device: the processes; where the numbers are wanted.
        passes: forward passes in the step (`schedule.accumulate`).
        number: which of them this is, from 0.
    """

    def __init__(
        self, seed: int, step: int, ranks: Ranks, device: torch.device, *, passes: int = 1, number: int = 0
    ) -> None:
        # Far apart for neighbouring steps, whatever the seed.
        self.generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 2_654_435_761 % 2**63)
        self.ranks, self.device, self.passes, self.number = ranks, device, passes, number

    def rand(self, shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
        """Uniform in [0,1), `shape[0]` rows for this rank's samples of this pass."""
        count = shape[0] * self.ranks.world_size
        everyone = torch.rand(count * self.passes, *shape[1:], generator=self.generator)
        mine = everyone[self.number * count : (self.number + 1) * count][self.ranks.rank :: self.ranks.world_size]
        return mine.to(device or self.device, non_blocking=True)


@dataclass(frozen=True)
class StepTotals:
    """Sums over all forward passes and ranks of an optimizer step, known before the first of these passes.

    Attributes:
        passes: forward passes of each rank in the step (`schedule.accumulate`).
        values: the sums, by name. Empty for a step of one pass, in which terms sum over the ranks themselves.
    """

    passes: int = 1
    values: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class StepInputs:
    """The inputs of a forward pass.

    Attributes:
        images: [N,3,H,W], augmented and normalised.
        target: int64 [N], or float [N,K] of 0 and 1 where an image may show several classes.
        boxes, ignore: of N images; areas that count neither as inside nor as outside, or None.
        groups: int64 [N], or None where the data has none.
        weight: float32 [N], the samples' weights, or None without reweighting.
        partner, share: int64 [N] and float [N] where images are mixed: `share` of each is the image of `target`, the
            rest is the image that `partner` names. None: they are not mixed.
        epoch: from 0.
        draws, ranks: random numbers, and the other processes.
    """

    images: Tensor
    target: Tensor
    boxes: Boxes
    ignore: Boxes | None
    groups: Tensor | None
    weight: Tensor | None
    epoch: int
    draws: Draws
    ranks: Ranks
    partner: Tensor | None = None
    share: Tensor | None = None

    def over_targets(self, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Each sample's loss [N] of a function of the targets. Where images are mixed, that of both of their targets by
        their shares."""
        own = loss(self.target)
        if self.share is None or self.partner is None:
            return own
        return self.share * own + (1 - self.share) * loss(self.target[self.partner])


@dataclass(kw_only=True)
class State(StepInputs):
    """One forward pass of a step, which has as many as `schedule.accumulate` on every rank.

    The losses of all passes and ranks are averaged. A mean over the samples of the step is therefore this pass's sum
    of terms, divided by `total(denominator) / parts`.

    Attributes:
        student, teacher: what they gave; `teacher` is None where no term asked for it.
        seen: what the guide watched, or None without one.
        watched: the same of the term `explain`.
        totals: sums over the whole step.
        number: which of the step's passes this is, from 0.
    """

    student: Outputs
    teacher: Outputs | None
    seen: Seen | None
    watched: Seen | None = None
    totals: StepTotals = field(default_factory=StepTotals)
    number: int = 0

    @property
    def parts(self) -> int:
        """How many losses are averaged: one for each pass of each rank."""
        return self.totals.passes * self.ranks.world_size

    def total(self, name: str, own: Tensor) -> Tensor:
        """The step's sum of what a term's `tally` calls `name` and what is `own` in this pass; a constant.

        Raises:
            KeyError: the step has several passes, and no tally gave it.
        """
        return self.ranks.sum(own) if self.totals.passes == 1 else self.totals.values[name]

    def shares(self, weighted: bool) -> Tensor | None:
        """[N] of which the sum over this pass's samples, averaged over all parts, makes a mean by the samples' weights.

        None where all count alike: not `weighted`, or no weights. Factors of the samples, and not of their sum, leave
        nothing to scale in the gradient of a whole feature map.
        """
        return self._shares if weighted else None

    @cached_property
    def _shares(self) -> Tensor | None:
        """Once a pass: ranks have to wait for each other."""
        if self.weight is None:
            return None
        return self.weight / (self.total("weight", self.weight.sum()) / self.parts)

    def mean(self, each: Tensor, weighted: bool) -> Tensor:
        """Of each sample's loss [N]; by the samples' weights if `weighted` and there are any."""
        shares = self.shares(weighted)
        return each.mean() if shares is None else (shares * each).sum()


@dataclass
class Setting:
    """What terms are built from: widths of the last feature maps and pooled features, and the task."""

    num_classes: int
    multi_label: bool
    num_groups: int
    student_width: int
    teacher_width: int | None


@dataclass
class TermOptions:
    """When a term is active, and its weight.

    Args:
        weight: its factor.
        start: the first epoch that it counts in, from 0.
        ramp: over so many epochs its factor rises linearly from `weight / (ramp + 1)`.
    """

    weight: float = 1.0
    start: int = 0
    ramp: int = 0

    def factor(self, epoch: int) -> float:
        """The factor in `epoch`; 0 where the term is inactive."""
        if epoch < self.start:
            return 0.0
        return self.weight * min((epoch - self.start + 1) / (self.ramp + 1), 1.0)


class Term(nn.Module):
    """A loss by name.

    A subclass says what it needs of a step, and gets only that. Modules and buffers that it owns are trained, saved and
    moved with the student.

    Attributes:
        needs: any of "student.feature", "student.pooled", "teacher.feature", "teacher.pooled", "teacher.logits",
            "groups", "boxes".
        undecayed: the optimiser's weight decay leaves its parameters alone.
        own: names of buffers in which every rank sums up by itself.
        tallied: what `tally` reads, "inputs" or "logits"; None: there is nothing to tally.
        mixes: its loss is right for mixed images (`data.mixup`, `data.cutmix`): it is of the images alone, or computed
            by `StepInputs.over_targets`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    no_weight_decay: ClassVar[bool] = False
    own: ClassVar[frozenset[str]] = frozenset()
    tallied: ClassVar[Literal["inputs", "logits"] | None] = None
    mixes: ClassVar[bool] = False

    def __init__(self, options: TermOptions) -> None:
        super().__init__()
        self.options = options

    def active(self, epoch: int) -> bool:
        """Whether the term runs in an epoch."""
        return self.options.factor(epoch) > 0

    def tally(self, inputs: StepInputs, logits: Tensor | None) -> dict[str, Tensor]:
        """What one pass adds to sums that the loss needs of the whole step (`State.total`), by name.

        Called for every pass of a step before its first loss, where the step has several. Random numbers have to be
        drawn in the same order as in `forward`.

        Args:
            inputs: of the pass.
            logits: the student's, [N,K], if `tallied` is "logits": that costs a forward pass without gradients.
        """
        return {}

    def forward(self, state: State) -> Tensor:
        """The loss of one pass, without its weight: a scalar."""
        raise NotImplementedError

    def end_epoch(self, epoch: int, ranks: Ranks) -> None:
        """Called after the last step of an epoch, on every rank."""

    def deployed(self, student: nn.Module) -> nn.Module:
        """The module to evaluate and save: the student, or the student with what the term adds to it."""
        return student
