"""The training loop of every stage: steps, validation, checkpoints.

The host waits for the device only every `log_every` steps, at checkpoints and between epochs. Random numbers depend on
seed and step, the learning rate on the step, the order of images on seed and epoch. The checkpoint holds the rest, so
that a killed run resumes with the same results as an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.data import Batch
from debiaskd.recipe import Compute, Schedule
from debiaskd.terms import Draws, Ranks, StepTotals
from debiaskd.training.batches import SplitLoader, grouped
from debiaskd.training.checkpoint import Checkpoints
from debiaskd.training.divergence import check_weights, diverged_loss
from debiaskd.training.fabric import seed_device
from debiaskd.training.learner import Learner, Step
from debiaskd.training.loggers import wanted
from debiaskd.training.logs import Logs
from debiaskd.training.schedule import Ema, optimizer, rate
from debiaskd.training.selection import CheckpointSelector
from debiaskd.training.teacher_cache import ViewDraws

#: Called after every step with the fraction of the training that is done, and with a message or "".
Progress = Callable[[float, str], None]

#: The metrics of an epoch that are reported at once; the log has all of them.
_HEADLINE = ("f1", "map", "accuracy", "worst_group_accuracy", "epg", "iou")


@dataclass
class Plan:
    """Everything that one training needs.

    Attributes:
        folder: of the stage.
        identity: of everything that decides the outcome; checkpoints of another are refused.
        learner, loader, schedule, compute, seed, selector: see there.
        validate: (model in evaluation mode) to its metrics on the validation images; None: not validated.
        every: epochs between validations.
        views: how many fixed augmentations each image has; None: another one every time.
        config: the recipe, for loggers.
    """

    folder: Path
    identity: str
    learner: Learner
    loader: SplitLoader
    schedule: Schedule
    compute: Compute
    seed: int
    validate: Callable[[nn.Module], dict[str, float]] | None
    selector: CheckpointSelector
    every: int = 1
    views: int | None = None
    config: Mapping[str, Any] | None = None


@dataclass
class PendingLosses:
    """The losses [T] of a step, on the device, not read yet."""

    step: int
    numbers: Tensor | None
    names: tuple[str, ...]
    losses: Tensor


class TrainingLoop:
    """Run a `Plan` on a launched Fabric."""

    def __init__(self, plan: Plan, fabric: Any, progress: Progress | None = None) -> None:
        self.plan, self.fabric, self.progress = plan, fabric, progress
        self.ranks = Ranks()
        self.learner = plan.learner
        self.learner.place(fabric.device)
        self.learner.to(memory_format=torch.channels_last)
        if plan.compute.sync_batchnorm and self.ranks.world_size > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.learner)
        self.module = fabric.setup_module(self.learner, move_to_device=True)
        self.optimizer = fabric.setup_optimizers(optimizer(plan.schedule, self.learner))
        decay, warmup = plan.schedule.ema, plan.schedule.ema_warmup is not False
        self.ema = None if decay is None else Ema(self.learner, decay, warmup=warmup)
        self.checkpoints = Checkpoints(plan.folder / "checkpoints", plan.identity)
        self.logs = Logs(plan.folder, fabric.is_global_zero, wanted(plan.compute), plan.config)
        self.steps = len(plan.loader) // plan.schedule.accumulate
        self.step = 0
        self.pending: list[PendingLosses] = []
        self.window: dict[str, list[float]] = {}
        self.clock, self.seen = time.perf_counter(), 0

    def run(self) -> None:
        """Train to the end, from the last checkpoint.

        Raises:
            DivergedError: a loss or the weights became NaN or infinite; the checkpoints are as they were before.
            CheckpointError: there are checkpoints, and none that can be used.
        """
        self._resume()
        schedule = self.plan.schedule
        while self.step < schedule.epochs * self.steps and self.waited is None:
            epoch, done = divmod(self.step, self.steps)
            per_pass = self.plan.loader.dataloader.batch_size
            self.plan.loader.sampler.start_at(epoch, done * schedule.accumulate * per_pass)
            self.module.train()
            for passes in grouped(iter(self.plan.loader.dataloader), schedule.accumulate):
                self._step(passes, epoch)
                if self.step % self.steps == 0:
                    break  # what is left over is no whole step
            self._end_epoch(epoch)
        self.logs.close()

    # -- a step -------------------------------------------------------------------------------------------------------

    def _step(self, passes: list[Batch], epoch: int) -> None:
        schedule, compute = self.plan.schedule, self.plan.compute
        for group in self.optimizer.param_groups:
            group["lr"] = rate(schedule, self.step, self.steps)
        totals, found = self._totals(passes, epoch), []
        for number, part in enumerate(self._parts(passes, epoch)):
            part.totals = totals
            last = number + 1 == len(passes)
            with self.fabric.no_backward_sync(self.module, enabled=not last):
                total, losses = self.module(part)
                self.fabric.backward(total / len(passes))
            found.append(torch.stack([total.detach().float(), *losses.values()]))
            self.seen += len(part.batch) * self.ranks.world_size
        indices = [batch.index for batch in passes if batch.index is not None]
        numbers = torch.cat(indices) if indices else None
        self.pending.append(PendingLosses(self.step, numbers, ("loss", *losses), torch.stack(found).mean(0)))
        if schedule.clip is not None:
            # Gradients that float16 does not hold make a loss scaler leave the step out; others show in the next loss.
            self.fabric.clip_gradients(self.module, self.optimizer, max_norm=schedule.clip, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.learner, self.step)
        if self.step % compute.log_every == 0 or self.step == schedule.epochs * self.steps:
            self._read_losses()
            self._log(epoch)
        if compute.checkpoint_every is not None and self.step % compute.checkpoint_every == 0:
            self._read_losses()
            if self.step % self.steps:  # an epoch's end has its own
                check_weights(self.learner, self.step, self.steps)
                self._save()
        self._report()

    def _parts(self, passes: list[Batch], epoch: int, *, placed: bool = True) -> Iterator[Step]:
        """The passes of a step, one at a time; `placed` on the device, as the network reads them."""
        for number, batch in enumerate(passes):
            draws = Draws(self.plan.seed, self.step, self.ranks, self.fabric.device, passes=len(passes), number=number)
            place = self.ranks.rank + self.ranks.world_size * number
            seed_device(draws.generator.initial_seed() + place, self.fabric.device)  # for dropout
            shown = self.plan.loader.transform(batch, self._augmentation(batch, epoch, draws)) if placed else batch
            yield Step(shown, epoch, draws, self.ranks, batch.index, number=number)

    def _totals(self, passes: list[Batch], epoch: int) -> StepTotals:
        """What the step's losses divide by. Images are augmented twice where a term looks at them for it: to hold all
        of them would take the memory that several passes are to save."""
        if len(passes) == 1:
            return StepTotals()
        with self.fabric.autocast():
            return self.learner.totals(self._parts(passes, epoch, placed=self.learner.tallied(epoch)))

    def _augmentation(self, batch: Batch, epoch: int, draws: Draws) -> Draws | ViewDraws:
        views = self.plan.views
        if views is None or batch.index is None:
            return draws
        return ViewDraws(self.plan.seed, batch.index, epoch % views, self.fabric.device)

    def _report(self, news: str = "") -> None:
        if self.progress is not None:
            self.progress(self.step / (self.plan.schedule.epochs * self.steps), news)

    def _read_losses(self) -> None:
        """Read all pending losses at once."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        joined = self.ranks.mean(torch.cat([entry.losses for entry in pending])).cpu()
        values = joined.split([len(entry.losses) for entry in pending])
        for entry, losses in zip(pending, values):
            for name, value in zip(entry.names, losses.tolist()):
                if value - value != 0:
                    found = dict(zip(entry.names, losses.tolist()))
                    raise diverged_loss(entry.step, self.steps, found, entry.numbers, self.plan.loader.split.name)
                self.window.setdefault(name, []).append(value)

    def _log(self, epoch: int) -> None:
        window, self.window = self.window, {}
        row = {name: sum(values) / len(values) for name, values in window.items()}
        now = time.perf_counter()
        speed, self.clock, self.seen = self.seen / max(now - self.clock, 1e-9), now, 0
        learning_rate = rate(self.plan.schedule, self.step - 1, self.steps)
        self.logs.step(self.step, {"epoch": epoch, "learning_rate": learning_rate, **row}, speed)
        losses = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
        self._report(f"step {self.step}: {losses}; {speed:.0f} images/s")

    @property
    def waited(self) -> int | None:
        """Epochs without improvement after which training stops, the same on every rank; None: it goes on."""
        patience = self.plan.schedule.patience
        if patience is None:
            return None
        options = [self.learner.term(name).options for name in self.learner.names]
        waited = self.plan.selector.waited(max(option.start + option.ramp for option in options))
        return waited if waited >= patience else None

    # -- an epoch -----------------------------------------------------------------------------------------------------

    def _end_epoch(self, epoch: int) -> None:
        self._read_losses()
        check_weights(self.learner, self.step, self.steps)
        self.learner.end_epoch(epoch, self.ranks)
        plan, last, news = self.plan, epoch + 1 == self.plan.schedule.epochs, []
        if (epoch + 1) % plan.every == 0 or last:
            if self.ema is not None:
                self.ema.swap(self.learner)
            self._broadcast_buffers()
            model = self.learner.deployed()
            model.eval()
            figures = {} if plan.validate is None else plan.validate(model)
            plan.selector.update(epoch, figures, model, last, write=self.fabric.is_global_zero)
            if self.ema is not None:
                self.ema.swap(self.learner)
            if figures:
                self.logs.epoch(epoch, self.step, figures)
                shown = ", ".join(f"{name} {figures[name]:.4f}" for name in _HEADLINE if name in figures)
                news.append(f"epoch {epoch + 1} of {plan.schedule.epochs}: {shown}")
        if self.waited is not None and not last:
            news.append(f"stopped after epoch {epoch + 1} of {plan.schedule.epochs}: {self.waited} without improvement")
            if self.window:
                self._log(epoch)
        for line in news:
            self._report(line)
        self._save()
        plan.selector.prune(write=self.fabric.is_global_zero)
        self.clock, self.seen = time.perf_counter(), 0

    def _broadcast_buffers(self) -> None:
        """Batch norm's, of which every rank has its own unless they are synchronised: the first rank's."""
        if self.ranks.world_size > 1:
            for buffer in self.learner.extractor.buffers():
                torch.distributed.broadcast(buffer, 0)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if not self.plan.compute.checkpoints:
            return
        own = {name: self.ranks.gather(tensor[None]) for name, tensor in self.learner.own_state().items()}
        if self.fabric.is_global_zero:
            precision = self.fabric.strategy.precision
            state = {
                "learner": self.learner.state_dict(),
                "own": own,
                "optimizer": self.optimizer.state_dict(),
                "precision": precision.state_dict(),
                "ema": None if self.ema is None else self.ema.tensors,
                "window": self.window,
                "selector": self.plan.selector.state_dict(),
                "world_size": self.ranks.world_size,
            }
            self.checkpoints.save(self.step, state)
        self.fabric.barrier()

    def _resume(self) -> None:
        found = self.checkpoints.load()
        if found is not None:
            self.step, state = found
            self.learner.load_state_dict(state["learner"])
            same = state["world_size"] == self.ranks.world_size
            self.learner.load_own_state(state["own"], self.ranks.rank if same else None)
            self.optimizer.load_state_dict(state["optimizer"])
            self.fabric.strategy.precision.load_state_dict(state["precision"])
            if self.ema is not None:
                self.ema.tensors = {name: t.to(self.fabric.device) for name, t in state["ema"].items()}
            self.window = state["window"]
            self.plan.selector.load_state_dict(state["selector"] if "selector" in state else state["keeper"])
        self.fabric.barrier()
        self.plan.selector.prune(write=self.fabric.is_global_zero)
        self.logs.resume(self.step, self.step // self.steps - 1, self.steps)
