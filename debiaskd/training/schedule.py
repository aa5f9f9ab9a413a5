"""Learning-rate schedule, optimiser and weight averaging. The rate depends on the step only, so it needs no state."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor

from debiaskd.recipe import Schedule
from debiaskd.training.learner import Learner

#: Of one_cycle: share of the steps in which the rate rises; what the highest rate is divided by at first; what that is
#: divided by at the end. The defaults of `torch.optim.lr_scheduler.OneCycleLR`.
RISE, FIRST, FINAL = 0.3, 25.0, 1e4


def rate(schedule: Schedule, step: int, steps: int) -> float:
    """The learning rate of a step (from 0), with `steps` steps per epoch."""
    if schedule.shape == "one_cycle":
        return schedule.learning_rate * _one_cycle(step, schedule.epochs * steps)
    epoch = step / steps
    if epoch < schedule.warmup:
        return schedule.learning_rate * (step + 1) / (schedule.warmup * steps)
    if schedule.shape == "cosine":
        share = (epoch - schedule.warmup) / max(schedule.epochs - schedule.warmup, 1)
        return schedule.learning_rate * (1 + math.cos(math.pi * min(share, 1))) / 2
    if schedule.shape == "steps":
        passed = sum(epoch >= milestone for milestone in schedule.milestones or [])
        return schedule.learning_rate * float(0.1**passed)
    return schedule.learning_rate


def _one_cycle(step: int, total: int) -> float:
    """The share of the highest rate in a step, from 0, of `total`: up and down by half a cosine each."""
    top, first, last = RISE * total - 1, 1 / FIRST, 1 / FIRST / FINAL
    if step <= top:
        start, end, share = first, 1.0, step / top
    else:
        start, end, share = 1.0, last, (step - top) / (total - 1 - top)
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def brief_schedule(schedule: Schedule, epochs: int | None) -> Schedule:
    """The schedule of an identification model: without EMA and warm-up, for which it is too short, and
    without early stopping; of one_cycle only its fall."""
    shorter: dict[str, Literal["constant", "cosine"]] = {"steps": "constant", "one_cycle": "cosine"}
    return dataclasses.replace(
        schedule,
        epochs=epochs or 1,
        ema=None,
        ema_warmup=None,
        warmup=0,
        patience=None,
        shape=shorter.get(schedule.shape, schedule.shape),
        milestones=None,
    )


def optimizer(schedule: Schedule, learner: Learner) -> torch.optim.Optimizer:
    """Weight decay for matrices and kernels; not for biases, norms, and terms that want none."""
    spared = {
        id(p) for name in learner.names if learner.term(name).no_weight_decay for p in learner.term(name).parameters()
    }
    trained = [p for p in learner.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1 and id(p) not in spared]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": schedule.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1 or id(p) in spared], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, schedule.learning_rate, momentum=0.9, nesterov=True)
    kind = torch.optim.Adam if schedule.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, schedule.learning_rate)


class Ema:
    """A moving average of a learner's parameters, and of its student's floating-point buffers.

    Buffers of terms are no part of it: contexts are set once an epoch, and averaged they would be mostly the zeros that
    they were before.

    Args:
        learner: whose weights initialise the average.
        decay: the share of the average that stays in an update.
        warmup: smaller at first, as in timm's ModelEmaV3 with use_warmup: the n-th update keeps
            min(decay, 1 - n^(-2/3)), so that the first one replaces the initial weights.
    """

    def __init__(self, learner: Learner, decay: float, *, warmup: bool = False) -> None:
        self.decay, self.warmup = decay, warmup
        self.tensors = {name: tensor.clone() for name, tensor in _averaged(learner).items()}

    @torch.no_grad()
    def update(self, learner: Learner, number: int) -> None:
        """The `number`-th update, from 1."""
        decay = min(self.decay, 1 - number ** (-2 / 3)) if self.warmup else self.decay
        torch._foreach_lerp_(list(self.tensors.values()), list(_averaged(learner).values()), 1 - decay)

    def swap(self, learner: Learner) -> None:
        """The learner has the averages and this its weights; and back again."""
        own = {name: tensor.clone() for name, tensor in _averaged(learner).items()}
        learner.load_state_dict(self.tensors, strict=False)
        self.tensors = own


def _averaged(learner: Learner) -> dict[str, Tensor]:
    buffers = {name for name, _ in learner.terms.named_buffers(prefix="terms")}
    return {
        name: tensor
        for name, tensor in learner.state_dict().items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and name not in buffers  # not a guide's decision
    }
