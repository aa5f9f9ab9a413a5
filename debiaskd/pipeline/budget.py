"""How many epochs a budget of time pays for."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.nn import functional as F

from debiaskd.models.registry import build
from debiaskd.pipeline import distillation
from debiaskd.pipeline.distillation import Asked, Findings

#: Share of the budget that is planned for: validation, evaluation and the page take the rest.
PLANNED = 0.8


def affordable(found: Findings, asked: Asked, minutes: float) -> tuple[int, str]:
    """(epochs that a budget pays for, how that was found), from a few steps of both networks on random images.

    Raises:
        NetworkError: a network cannot be built.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = max(2, min(distillation.BATCH, found.train // 4))
    with torch.random.fork_rng():
        teacher, student = (
            build(name, len(found.classes), size=(found.size, found.size)).to(device)
            for name in (asked.teacher, asked.student)
        )
        images = torch.rand(batch, 3, found.size, found.size, device=device)
        taught, look = _seconds(teacher, images, train=asked.weights is None), _seconds(teacher, images, train=False)
        own = _seconds(student, images, train=True)
    steps = -(-found.train // batch)
    trained = taught if asked.weights is None else 0.0
    epoch = steps * (trained + own + own + look + (own if found.guided else 0.0))
    identification = steps * own if found.groups and not found.multi_label else 0.0
    count = int((PLANNED * 60 * minutes - identification) / epoch)
    epochs = max(1, min(distillation.EPOCHS, count))
    said = f"budget of {minutes:g} minutes: {epochs} epochs"
    if count >= distillation.EPOCHS:
        said += ", as without a budget"
    elif count < 1:
        said += f", although one takes about {epoch / 60:.1f} minutes"
    else:
        said += f" instead of {distillation.EPOCHS}"
    return epochs, f"{said} (one epoch of all networks takes about {epoch:.1f} s, measured)"


def _seconds(model: nn.Module, images: torch.Tensor, *, train: bool) -> float:
    """A step, the faster of two after one that is not counted."""
    model.train(train)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        with torch.set_grad_enabled(train):
            logits = model(images)
            if train:
                F.cross_entropy(logits, logits.new_zeros(len(images), dtype=torch.int64)).backward()
        if images.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    return min(times[1:])
