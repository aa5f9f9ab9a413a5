"""One loop for every method: what differs between methods is the model and the loss that come in, nothing else.

Pictures lie in memory as one tensor and batches are taken by index, so that a loss can look up what belongs to its
samples: labels, weights, or what a frozen teacher gave for them, computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

#: (model in training mode, images [n,3,S,S], their indices int64 [n]) to a scalar loss.
Loss: TypeAlias = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Schedule:
    """AdamW with a one-cycle learning rate.

    Attributes:
        epochs: passes over the training set, ≥ 1.
        batch: pictures a step.
        learning_rate: the peak.
        weight_decay: AdamW's, decoupled.
    """

    epochs: int
    batch: int = 100
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4


@dataclass(frozen=True)
class Fitted:
    """How a training run went.

    Attributes:
        epoch: which epoch's weights the model has now, from 1.
        scores: the validation score after each epoch; empty without selection.
    """

    epoch: int
    scores: tuple[float, ...]


def to_float(images: Tensor) -> Tensor:
    """uint8 [N,3,S,S] to what the networks read: float32 about zero, channels last, the faster layout on CPUs."""
    return ((images.float() - 128) / 64).contiguous(memory_format=torch.channels_last)


def fit(
    model: nn.Module,
    images: Tensor,
    loss: Loss,
    schedule: Schedule,
    *,
    generator: torch.Generator,
    score: Callable[[nn.Module], float] | None = None,
    sampling: Tensor | None = None,
    on_epoch: Callable[[], None] | None = None,
    epoch_ended: Callable[[], None] | None = None,
) -> Fitted:
    """Train `model` in place.

    Args:
        model: only parameters that require grad are trained.
        images: [N,3,S,S] float.
        loss: see `Loss`.
        schedule: epochs, batch and optimiser.
        generator: decides the order of the samples.
        score: called after each epoch with the model in eval mode; the weights of the best epoch are kept (the later
            one of equals). None: the last epoch's.
        sampling: [N] probabilities up to a factor; an epoch then draws N samples with replacement. None: each once.
        on_epoch: called after each epoch, to show progress.
        epoch_ended: called after an epoch's last step, before anything is scored.

    Raises:
        ValueError: no picture, or fewer than one epoch.
        FloatingPointError: the loss became NaN or infinite.

    Example:
        >>> import torch
        >>> from debiaskd.cli.quickstart_loop import Schedule, fit
        >>> images, labels = torch.randn(8, 3, 4, 4), torch.arange(8) % 2
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
        >>> loss = lambda model, images, index: torch.nn.functional.cross_entropy(model(images), labels[index])
        >>> fit(model, images, loss, Schedule(epochs=3, batch=4), generator=torch.Generator())
        Fitted(epoch=3, scores=())
    """
    if not len(images) or schedule.epochs < 1:
        raise ValueError(f"images and epochs must be >= 1, got {len(images)} images, {schedule.epochs} epochs")
    model.to(memory_format=torch.channels_last)
    batch = min(schedule.batch, len(images))
    steps = len(images) // batch  # what is left over waits for the next epoch: batch norm needs full batches
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.learning_rate, schedule.epochs * steps + 1)
    scores: list[float] = []
    best, best_state = 0, None
    for epoch in range(1, schedule.epochs + 1):
        model.train()
        order = _order(len(images), sampling, generator)
        total = torch.zeros(())
        for index in order[: steps * batch].split(batch):
            value = loss(model, images[index], index)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            cycle.step()
            total += value.detach()
        if not torch.isfinite(total):
            raise FloatingPointError(f"the loss became {float(total)} in epoch {epoch}: training has diverged")
        if epoch_ended is not None:
            epoch_ended()
        model.eval()
        if score is not None:
            scores.append(score(model))
            if scores[-1] >= max(scores):
                best = epoch
                best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if on_epoch is not None:
            on_epoch()
    if best_state is not None:
        model.load_state_dict(best_state)
    return Fitted(best or schedule.epochs, tuple(scores))


def _order(count: int, sampling: Tensor | None, generator: torch.Generator) -> Tensor:
    if sampling is None:
        return torch.randperm(count, generator=generator)
    return torch.multinomial(sampling, count, replacement=True, generator=generator)


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], images: Tensor, batch: int = 500) -> Tensor:
    """`function` of all images, a batch at a time, without gradients, concatenated along the first axis."""
    return torch.cat([function(part) for part in images.split(batch)])
