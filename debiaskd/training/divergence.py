"""Stop a training whose loss or weights are not finite any more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class DivergedError(ArithmeticError):
    """A loss became NaN or infinite."""


def check_weights(module: nn.Module, step: int, steps: int) -> None:
    """Check before a checkpoint: a gradient may be NaN where the loss was not, and only the next loss would show it.

    Args:
        module: whose trained parameters are checked.
        step: steps that are done.
        steps: of an epoch.

    Raises:
        DivergedError: a parameter is not finite.
    """
    weights = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
    finite = torch.stack([tensor.detach().isfinite().all() for tensor in weights.values()]).tolist()
    bad = [name for name, is_finite in zip(weights, finite) if not is_finite]
    if bad:
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise DivergedError(
            f"training diverged by step {step - 1}, epoch {(step - 1) // steps}: its losses were finite, and the "
            f"weights after it are not ({bad[0]}{more}); the last checkpoint is from before. A smaller learning rate, "
            "or clip, may help"
        )


def diverged_loss(
    step: int, steps: int, losses: Mapping[str, float], numbers: Tensor | None, split: str
) -> DivergedError:
    """The error of a step whose loss is not finite.

    Args:
        step: from 0.
        steps: of an epoch.
        losses: "loss" and each term's, by name.
        numbers: int64 [N], the images of the step, or None.
        split: that they are of.
    """
    bad = [f"terms.{name} {value}" for name, value in losses.items() if value - value != 0 and name != "loss"]
    images = [] if numbers is None else numbers.tolist()
    shown = ", ".join(map(str, images[:16])) + (", …" if len(images) > 16 else "")
    return DivergedError(
        f"training diverged in step {step}, epoch {step // steps}: {', '.join(bad) or 'the loss'}; images {shown} of "
        f"{split}; the last checkpoint is from before. A smaller learning rate, or clip, may help"
    )
