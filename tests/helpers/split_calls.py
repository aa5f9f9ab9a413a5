"""Calls of every op that are cut into many pieces, as functions of a dtype that return a loss and a gradient.

    DEBIASKD_GPU_TILES=1 TRITON_INTERPRET=1 python tests/helpers/split_calls.py

runs them in Triton's interpreter with the tiles that a GPU has, and prints as JSON how far each is from float64.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys

import torch
from cases import attribution, normal, uniform

import debiaskd as dk

BOXES = [[[3, 2, 40, 50], [20, 5, 60, 30]], [], None]


def gradient_of(loss, tensor):
    return loss.detach(), torch.autograd.grad(loss.sum(), tensor)[0]


def localized(dtype, pixels, size, kind):
    maps = attribution(kind, 3, pixels, pixels).to(dtype).requires_grad_()
    return gradient_of(dk.localization_loss(maps, dk.Boxes.from_lists(BOXES), kind=kind, size=size), maps)


def matched(dtype, samples, width, normalize):
    x, teacher = (normal(samples, width, seed=i).to(dtype) for i in range(2))
    x.requires_grad_()
    return gradient_of(dk.feature_match_loss(x, teacher, uniform(samples), normalize=normalize), x)


def compared(dtype, student, teacher):
    x, constant = (normal(3, *size, seed=i).to(dtype) for i, size in enumerate((student, teacher)))
    x.requires_grad_()
    return gradient_of(dk.map_cosine_loss(x, constant, uniform(3)), x)


def dotted(dtype, shape, memory_format):
    x, gradient = (normal(*shape, seed=i).to(dtype).to(memory_format=memory_format) for i in range(2))
    x.requires_grad_()
    return gradient_of(dk.channel_dot(gradient, x), x)


def related(dtype, samples, width, classes):
    x, teacher = (normal(samples, width, seed=i).to(dtype) for i in range(2))
    x.requires_grad_()
    return gradient_of(dk.class_relation_loss(x, teacher, torch.arange(samples) ** 2 % classes), x)


def adjusted(dtype, samples, classes):
    shapes = ((samples, 8), (samples, classes), (classes, 6), (classes, 14))
    x, logits, context, weight = (normal(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes))
    x.requires_grad_()
    return gradient_of(dk.backdoor_logits(x, logits, context, weight, mode="exact"), x)


#: Each is cut into blocks, tiles or parts whose number depends on the device or on the sizes of tiles.
CALLS = {
    "feature_match": lambda dtype: matched(dtype, 3, 100_000, False),
    "feature_match, normalized": lambda dtype: matched(dtype, 2, 60_000, True),
    "localization": lambda dtype: localized(dtype, 64, None, "energy"),
    "localization, upsampled": lambda dtype: localized(dtype, 20, (64, 70), "rrr"),
    "map_cosine": lambda dtype: compared(dtype, (70, 300), (70, 300)),
    "map_cosine, small student": lambda dtype: compared(dtype, (20, 21), (70, 300)),
    "map_cosine, small teacher": lambda dtype: compared(dtype, (64, 70), (20, 20)),
    "channel_dot": lambda dtype: dotted(dtype, (1, 700, 2, 4), torch.contiguous_format),
    "channel_dot, channels_last": lambda dtype: dotted(dtype, (2, 600, 2, 2), torch.channels_last),
    "class_relation": lambda dtype: related(dtype, 40, 300, 7),
    "class_relation, one class": lambda dtype: related(dtype, 70, 40, 1),
    "backdoor": lambda dtype: adjusted(dtype, 70, 9),
}


def errors(name: str) -> list[float]:
    """Of loss and gradient in float32, relative to the largest value."""
    with dk.backend("eager"):
        exact = CALLS[name](torch.float64)
    with dk.backend("triton"):
        found = CALLS[name](torch.float32)
    return [float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, exact)]


if __name__ == "__main__":
    with contextlib.suppress(AttributeError):  # of a Triton that is built otherwise
        importlib.import_module("quick_interpreter").quicken()
    json.dump({name: errors(name) for name in CALLS}, sys.stdout)
