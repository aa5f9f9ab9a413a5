"""Find an input that a model runs on, for the trial runs that inspect it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from debiaskd.models.modules import share
from debiaskd.utils import checks


def runnable(role: str, model: object) -> nn.Module:
    """The model, if it is a module that holds values."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{role} must be a torch.nn.Module, got {type(model).__name__}")
    if any(tensor.is_meta or is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(f"{role} must hold values, got parameters on the meta device or of lazy layers")
    return model


def input_of(role: str, model: nn.Module, example: Tensor | None = None, *, large: bool = False) -> Tensor:
    """A small input [1,...] that `model`, called `role` in messages, runs on in eval mode; `large`: of its usual size.

    Raises:
        ValueError: no usual size runs, or `example` does not.
    """
    copied, errors = share(model).eval(), []
    for images in candidate_inputs(model, example, large):
        try:
            with torch.no_grad():
                copied(images)
        except Exception as error:  # a guessed size may fail in whatever way the model likes
            errors.append(error)
        else:
            return images
    raise no_input(role, example, errors) from errors[0]


def no_input(role: str, example: Tensor | None, errors: list[Exception]) -> ValueError:
    got = "none, and no usual size runs" if example is None else f"shape {list(example.shape)}"
    reason = f"{type(errors[0]).__name__}: {errors[0]}"
    return ValueError(f"example must be an input that the {role} runs on, got {got} ({reason})")


def candidate_inputs(model: nn.Module, example: Tensor | None, large: bool = False) -> Iterator[Tensor]:
    like = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.empty(0))
    if example is not None:
        yield checks.floating("example", example)[:1].detach().to(like)
        return
    loose: Any = model
    stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    usual = tuple((getattr(loose, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224)))
    # A first convolution may stand behind a transform of the pixels; a network may have been built for other channels.
    channels = dict.fromkeys([3 if stem is None else stem.in_channels, usual[0]])
    fixed = getattr(getattr(loose, "patch_embed", None), "img_size", None)
    generator = torch.Generator().manual_seed(0)
    sizes = [tuple(usual[1:]), (224, 224), (32, 32), (28, 28)]
    sizes.insert(len(sizes) if large else 0, (64, 64))
    for size in [tuple(fixed)] if fixed else sizes:
        for count in channels:
            yield torch.randn(1, count, *size, generator=generator).to(like)
