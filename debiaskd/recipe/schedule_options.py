"""What a recipe can say of the length and the learning rate of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class Schedule:
    """How long, how fast.

    Args:
        epochs: over the training images.
        batch: images a step, of all processes and accumulated passes together.
        optimizer: "sgd" has momentum 0.9 and Nesterov's step.
        learning_rate: the highest.
        weight_decay: not for biases, norms, and CID's regressor.
        shape: of the learning rate over the epochs; "steps" multiplies it by 0.1 at `milestones`; "one_cycle" rises to
            it over the first 30 % of all steps, from a 25th, and falls to a 250,000th, as PyTorch's OneCycleLR does
            with its defaults and `cycle_momentum=False`.
        milestones: epochs, for "steps" alone.
        warmup: epochs of linear rise before; not for "one_cycle".
        patience: stop after so many epochs without improvement of what `selection.rule` compares: a higher value, or an
            epoch on the Pareto front. Epochs before all terms have their full weight do not count. All epochs are
            trained if it is left out.
        accumulate: forward and backward passes a step, of batch / accumulate images each; saves memory.
        clip: largest norm of the gradient; not clipped if it is left out.
        ema: decay of a moving average of the weights, which is what is evaluated and saved; none if it is left out.
        ema_warmup: the decay of step n is min(ema, 1 - n^(-2/3)), as in timm's ModelEmaV3, so that a short training's
            average is not mostly its initial weights; false: `ema` from the first step on. For ema; true if it is
            left out.
    """

    epochs: int = 50
    batch: int = 64
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    shape: Literal["constant", "cosine", "steps", "one_cycle"] = "constant"
    milestones: list[int] | None = None
    warmup: int = 0
    patience: int | None = None
    accumulate: int = 1
    clip: float | None = None
    ema: float | None = None
    ema_warmup: bool | None = None
