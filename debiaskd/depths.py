"""The layers at which a model is looked at: by name, or as Input, Mid1, Mid2, Mid3 and Final.

For a ResNet these are the image and the outputs of its four stages. For others they are found on one small run:

    Final     what timm's `forward_features` gives; without it, the last map of more than one position
    Mid1 - 3  the three stages before, by timm's `feature_info`; transformers, whose maps all have one size, after a
              quarter, half and three quarters of their blocks; without it, the last of the outermost modules that give
              a map of a size
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from debiaskd.features import Layout, layout_of, named_module, share

DEPTHS = ("Input", "Mid1", "Mid2", "Mid3", "Final")


@dataclass(frozen=True)
class Depth:
    """A place in a model: the module whose output it is, None for the images; and how that output is laid out."""

    module: str | None
    layout: Layout


@dataclass
class _Run:
    name: str
    output: Tensor
    times: int = 1


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, inside of DistributedDataParallel or torch.compile."""
    inner: Any = model
    while True:
        wrapped = getattr(inner, "_orig_mod", None)
        if wrapped is None and isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            wrapped = inner.module
        if wrapped is None:
            return inner  # type: ignore[no-any-return]
        inner = wrapped


def check_layer(model: nn.Module, layer: object) -> None:
    """A depth, or a name of one of the model's modules."""
    if layer not in DEPTHS:
        try:
            named_module("layer", "model", unwrap(model), layer)
        except ValueError as error:
            raise ValueError(f"{error}; or one of {', '.join(DEPTHS)}") from None


def find(model: nn.Module, layer: str, images: Tensor) -> Depth:
    """Where `layer` is in `model`.

    Args:
        model: any module; one image runs through a copy of it in eval mode.
        layer: one of DEPTHS, or a module's name.
        images: [N,3,H,W] that the model runs on, N ≥ 1.

    Raises:
        ValueError: no such layer, or its output is no feature map.
    """
    if layer == "Input":
        return Depth(None, Layout())
    model = unwrap(model)
    runs, final = _run(model, images[:1].detach())
    if layer not in DEPTHS:
        name = layer
    elif layer == "Final":
        name = _final(runs, final)
    else:
        stages = _stages(model, runs, images)
        if len(stages) < 4:
            raise ValueError(
                f"layer {layer!r} is not known in {type(model).__name__}, which has the stages {stages or 'none'}: "
                "name a module"
            )
        name = stages[-4:][DEPTHS.index(layer) - 1]
    run = next((run for run in runs if run.name == name), None)
    if run is None or run.times > 1:
        times = 0 if run is None else run.times
        raise ValueError(f"layer {name!r} must run once in a forward pass and give one tensor, it did {times} times")
    return Depth(name, layout_of("model", model, run.output, images))


def _run(model: nn.Module, image: Tensor) -> tuple[list[_Run], Tensor | None]:
    """Modules that gave a tensor, in the order in which they did so, and what `forward_features` gave."""
    copied: Any = share(model).eval()
    runs: dict[str, _Run] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                times = runs.pop(name).times + 1 if name in runs else 1
                runs[name] = _Run(name, output, times)

        return hook

    for name, module in copied.named_modules():
        if name:
            module.register_forward_hook(note(name))
    final = None
    with torch.no_grad():
        if callable(getattr(copied, "forward_features", None)) and callable(getattr(copied, "forward_head", None)):
            final = copied.forward_features(image)
            copied.forward_head(final)
        else:
            copied(image)
    return list(runs.values()), final


def _final(runs: list[_Run], final: Tensor | None) -> str:
    if final is not None:
        names = [run.name for run in runs if run.output is final and run.times == 1]
        if names:
            return names[-1]
    else:
        names = [run.name for run in runs if _positions(run) > 1 and run.times == 1]
        outermost = min((name.count(".") for name in names), default=0)
        names = [name for name in names if name.count(".") == outermost]
        if names:
            return names[-1]
    raise ValueError("layer 'Final' was not found: name the module that gives the last feature map")


def _positions(run: _Run) -> int:
    return run.output.shape[2] * run.output.shape[3] if run.output.dim() == 4 else 0


def _stages(model: nn.Module, runs: list[_Run], images: Tensor) -> list[str]:
    info: Any = getattr(model, "feature_info", None)
    if info is not None:
        entries = list(getattr(info, "info", info))
        by_reduction = {entry["reduction"]: entry["module"] for entry in entries}  # the last of each
        if len(by_reduction) >= 4:
            return list(by_reduction.values())
        return [entries[-(-len(entries) * quarter // 4) - 1]["module"] for quarter in range(1, 5)] if entries else []
    sizes = sorted({_positions(run) for run in runs} - {0, 1, images.shape[2] * images.shape[3]}, reverse=True)
    stages = []
    for size in sizes:
        names = [run.name for run in runs if _positions(run) == size and run.times == 1]
        outermost = min((name.count(".") for name in names), default=0)
        stages += [name for name in names if name.count(".") == outermost][-1:]
    return stages


@contextmanager
def output_of(module: nn.Module, watch: bool) -> Iterator[list[Tensor]]:
    """What the module gives within; `watch`: made part of a graph, if frozen layers have left it out of any."""
    thread, caught = threading.get_ident(), []

    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        if threading.get_ident() != thread or not isinstance(output, Tensor):
            return None
        if watch and torch.is_grad_enabled() and not output.requires_grad:
            output = output.detach().requires_grad_()
        caught.append(output)
        return output

    handle = module.register_forward_hook(hook)
    try:
        yield caught
    finally:
        handle.remove()


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch norm in training normalizes as ever, and does not count what it sees: the batch has been counted."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
