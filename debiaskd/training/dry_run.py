"""Run one training step of every network of a recipe before the training starts.

Networks are built and probed in evaluation mode. What fails in training alone (batch norm on one value a channel, an
attribution that cannot be differentiated twice, a pass that does not fit in memory) would otherwise show in the first
step of its stage: for the student, after the teacher has been trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from debiaskd.recipe import RecipeError, Schedule
from debiaskd.terms import Draws, Ranks
from debiaskd.training.batches import SplitLoader
from debiaskd.training.learner import Learner, Step


class DryRun:
    """Run single training steps, forward and backward, without updating weights.

    Args:
        fabric: launched.
        loader: augmented as in training, read by this process alone.
        name: the network's.
        key: the recipe's section of the network, "student" or "teacher".
        schedule_key: the recipe's section of its schedule, "schedule".
        schedule: of its training.
        several: whether batch norm counts the images of other processes as well.
        own_terms: names of the user's terms.
    """

    def __init__(
        self,
        fabric: Any,
        loader: SplitLoader,
        name: str,
        key: str,
        schedule_key: str,
        schedule: Schedule,
        *,
        several: bool = False,
        own_terms: Sequence[str] = (),
    ) -> None:
        self.fabric, self.loader, self.schedule, self.several = fabric, loader, schedule, several
        self.own_terms = list(own_terms)
        self.name, self.key, self.schedule_key = name, key, schedule_key
        self.count: int = loader.dataloader.batch_size

    def run(self, learner: Learner) -> None:
        """Run one step with a full pass of images; discard `learner` afterwards.

        Raises:
            RecipeError: the step fails; the message names the recipe key to change.
        """
        error = self._error(learner, max(self.count, 2) if self.several else self.count)
        if error is None:
            return
        raise RecipeError(self._failure_message(learner, error)) from error

    def _failure_message(self, learner: Learner, error: Exception) -> str:
        shown = f"({' '.join(str(error).split())[:300] or type(error).__name__})"
        passes = f"{self.count} image{'s' if self.count > 1 else ''} a pass"
        if isinstance(error, torch.OutOfMemoryError):
            key = f"{self.schedule_key}.batch"
            return f"{key}: {passes} do not fit in memory; a larger {self.schedule_key}.accumulate needs less {shown}"
        if self.count == 1 and self._error(learner, 2) is None:
            accumulate = self.schedule.accumulate
            key = f"{self.schedule_key}.{'accumulate' if accumulate > 1 else 'batch'}"
            got = f"accumulate={accumulate} of batch={self.schedule.batch} gives" if accumulate > 1 else "gives"
            return f"{key}: {got} {passes}, and {self.name} needs 2 in training mode {shown}"
        maps = [f"terms.{name}" for name in ("guide", "explain") if name in learner.names]
        if maps and self._error(learner, self.count, plain=True) is None:
            return f"{', '.join(maps)}: cannot train {self.name} {shown}"
        own = [f"terms.{name}" for name in self.own_terms if name in learner.names]
        if own and self._error(learner, self.count, plain=True) is None:
            kind = f"{type(error).__name__}: " if str(error) else ""
            return f"{', '.join(own)}: a training step fails ({kind}{shown[1:]}"
        return f"{self.key}.name: {self.name} cannot be trained, in training mode it fails on {passes} {shown}"

    def _error(self, learner: Learner, count: int, *, plain: bool = False) -> Exception | None:
        split = self.loader.split
        batch = split.whole.__getitems__(split.numbers[torch.arange(count) % len(split)])
        alone = Ranks()
        alone.rank, alone.world_size = 0, 1  # ranks do not wait for each other: one may fail where another does not
        draws, device = Draws(0, 0, alone, self.loader.device), self.loader.device
        try:
            with _seeded(device), self.fabric.autocast():
                learner.place(device)
                learner.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
                learner.train()
                placed = self.loader.transform(batch, draws)
                last = self.schedule.epochs - 1  # when all terms count
                if plain:  # the model alone
                    total = learner.extractor(placed.images)[0].logits.float().sum()
                else:
                    total, _ = learner(Step(placed, last, draws, alone, batch.index))
                total.backward()
        except Exception as error:  # a third-party network may raise anything
            return error
        finally:
            learner.zero_grad(set_to_none=True)
        return None


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Seed random layers separately and restore the global generators afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
