"""Combine a student and its loss terms into one module whose forward computes the loss of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.attribution.attributor import Seen
from debiaskd.attribution.explainer import Explainer
from debiaskd.attribution.guide import Guide
from debiaskd.data import Batch
from debiaskd.models.wrappers import statistics_kept
from debiaskd.terms import Draws, Outputs, Ranks, State, StepInputs, StepTotals, Term
from debiaskd.training.feature_extraction import FeatureExtractor
from debiaskd.training.teacher_outputs import TeacherOutputs


class Step:
    """The inputs of one forward pass of a step.

    Not a dataclass: Fabric converts the precision of every tensor that it finds in one.

    Attributes:
        batch: augmented images of this process.
        epoch: from 0.
        draws, ranks: random numbers, and the other processes.
        numbers: int64 [N], the images' on the host, or None.
        totals: sums over the whole step, from `Learner.totals`.
        number: which of the step's passes this is, from 0.
    """

    def __init__(
        self,
        batch: Batch,
        epoch: int,
        draws: Draws,
        ranks: Ranks,
        numbers: Tensor | None = None,
        totals: StepTotals | None = None,
        number: int = 0,
    ) -> None:
        self.batch, self.epoch, self.draws, self.ranks, self.numbers = batch, epoch, draws, ranks, numbers
        self.totals, self.number = totals or StepTotals(), number


class Learner(nn.Module):
    """A student with its loss terms.

    Its parameters are all that is trained, its state dict is all that training changes in modules.

    Args:
        extractor: the student.
        terms: by name.
        teacher: not registered as a submodule, since nothing of it is trained, saved or synchronised; None: no term
            needs it.
        guide, explainer: of the student's own model, if there are the terms `guide` and `explain`.
        weight: float32 [M], a weight for every image of the training split, by its number; or None.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        terms: Mapping[str, Term],
        *,
        teacher: TeacherOutputs | None = None,
        guide: Guide | None = None,
        explainer: Explainer | None = None,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.extractor = extractor
        self.terms = nn.ModuleDict(terms)
        self._unregistered = (teacher, guide, explainer, weight)
        self.register_load_state_dict_pre_hook(_rename_old_keys)  # type: ignore[no-untyped-call]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.terms)

    def term(self, name: str) -> Term:
        found = self.terms[name]
        assert isinstance(found, Term)
        return found

    def place(self, device: torch.device) -> None:
        """Move to the device what is not registered in the module."""
        teacher, guide, explainer, weight = self._unregistered
        self._unregistered = (
            None if teacher is None else teacher.to(device),
            guide,
            explainer,
            None if weight is None else weight.to(device),
        )

    def forward(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (the loss to minimise, the unweighted loss of each term)."""
        teacher = self._unregistered[0]
        batch, epoch, active = step.batch, step.epoch, self._active(step.epoch)
        taught = any(need.startswith("teacher.") for term in active.values() for need in term.needs)
        student, seen, watched = self._run(batch.images, active)
        state = State(
            **self._inputs(step),
            student=student,
            teacher=teacher(batch, epoch, step.numbers) if taught and teacher is not None else None,
            seen=seen,
            watched=watched,
            totals=step.totals,
            number=step.number,
        )
        losses = {name: term(state) for name, term in active.items()}
        for name, loss in losses.items():
            if not isinstance(loss, Tensor) or loss.dim():
                got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"terms.{name}: forward must give a scalar tensor, got {got}")
        factors = {name: term.options.factor(epoch) for name, term in active.items()}
        # One that only prepares in this epoch, such as contexts being built, gives a zero that is no loss.
        total = torch.stack([(factors[name] or 1.0) * loss.float() for name, loss in losses.items()]).sum()
        # Every parameter gets a gradient in every step, be it zero: ranks wait for each other's, and an optimiser's
        # state must not depend on how many there are.
        idle = [
            student.logits,
            *(p for name in self.names if not factors.get(name) for p in self.terms[name].parameters()),
        ]
        total = total + sum(0.0 * part.float().sum() for part in idle if part.requires_grad)
        return total, {name: loss.detach().float() for name, loss in losses.items() if factors[name]}

    def _run(self, images: Tensor, active: Mapping[str, Term]) -> tuple[Outputs, Seen | None, Seen | None]:
        """The student's outputs, and what the guide and the explainer watched: in one pass where one can use the
        other's, else in two."""
        _, guide, explainer, _ = self._unregistered
        guide, explainer = guide if "guide" in active else None, explainer if "explain" in active else None
        if explainer is None or guide is None:
            watcher = guide or explainer
            outputs, seen = self.extractor(images, watcher)
            return outputs, seen if guide else None, seen if explainer else None
        outputs, seen = self.extractor(images, guide)
        if explainer.can_use(guide):
            explainer.decide_with(guide)
            return outputs, seen, seen
        with statistics_kept(self.extractor.model):
            return outputs, seen, explainer.watch(images)

    def tallied(self, epoch: int) -> bool:
        """Whether terms need more of a whole step than its samples' weights; `totals` then reads augmented images."""
        return any(term.tallied for term in self._active(epoch).values())

    @torch.no_grad()
    def totals(self, passes: Iterable[Step]) -> StepTotals:
        """What the losses of a step divide by, summed over its passes and over ranks.

        Args:
            passes: all that this process has in the step, one at a time. Each comes with random numbers of its own that
                begin where those of its `forward` will, and is made with the seed that dropout begins from there.
        """
        count, sums, ranks = 0, dict[str, Tensor](), Ranks()
        for step in passes:
            count, ranks, found = count + 1, step.ranks, self._tally(step)
            sums = {name: sums[name] + value for name, value in found.items()} if sums else found
        if count == 1 or not sums:
            return StepTotals(count)
        flat = ranks.sum(torch.cat([value.flatten() for value in sums.values()]))  # ranks wait for each other once
        parts = flat.split([value.numel() for value in sums.values()])
        return StepTotals(count, {name: part.view_as(sums[name]) for name, part in zip(sums, parts)})

    def _tally(self, step: Step) -> dict[str, Tensor]:
        inputs = StepInputs(**self._inputs(step))
        found = {} if inputs.weight is None else {"weight": inputs.weight.sum()}
        terms = [term for term in self._active(step.epoch).values() if term.tallied]
        logits = None
        if any(term.tallied == "logits" for term in terms):
            with statistics_kept(self.extractor.model):
                logits = self.extractor(inputs.images)[0].logits
        for term in terms:
            found |= term.tally(inputs, logits)
        return found

    def _active(self, epoch: int) -> dict[str, Term]:
        return {name: self.term(name) for name in self.names if self.term(name).active(epoch)}

    def _inputs(self, step: Step) -> dict[str, Any]:
        batch, weight = step.batch, self._unregistered[3]
        return {
            "images": batch.images,
            "target": batch.target.float() if batch.target.dim() == 2 else batch.target,
            "boxes": batch.boxes,
            "ignore": batch.ignore,
            "groups": batch.groups,
            "weight": None if weight is None or batch.index is None else weight[batch.index],
            "epoch": step.epoch,
            "draws": step.draws,
            "ranks": step.ranks,
            "partner": batch.partner,
            "share": batch.share,
        }

    def end_epoch(self, epoch: int, ranks: Ranks) -> None:
        for name in self.names:
            self.term(name).end_epoch(epoch, ranks)

    def own_state(self) -> dict[str, Tensor]:
        """What differs from rank to rank and is part of a checkpoint."""
        return {
            f"{name}.{buffer}": tensor
            for name in self.names
            for buffer, tensor in self.term(name).named_buffers()
            if buffer in self.term(name).own
        }

    def load_own_state(self, state: Mapping[str, Tensor], rank: int | None) -> None:
        """Of [world_size,...] this rank's; with None, for another number of ranks, the first gets the sum of all."""
        for name, tensor in self.own_state().items():
            saved = state[name]
            tensor.copy_(saved[rank] if rank is not None else saved.sum(0) if Ranks().rank == 0 else 0 * saved[0])

    def deployed(self) -> nn.Module:
        """The module to evaluate and save."""
        model = self.extractor.model
        for name in self.names:
            model = self.term(name).deployed(model)
        return model


#: What `Learner.extractor` was called in checkpoints of earlier versions.
_OLD_PREFIX = "watched."


def _rename_old_keys(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + _OLD_PREFIX)]:
        state[prefix + "extractor." + name.removeprefix(prefix + _OLD_PREFIX)] = state.pop(name)
