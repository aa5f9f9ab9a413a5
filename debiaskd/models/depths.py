"""Find layers for attributions: by module name, or as Input, Mid1, Mid2, Mid3 and Final.

For a ResNet these are the image and the outputs of its four stages. For others they are found on one small run:

    Final     what timm's `forward_features` gives; without it, the last map of more than one position
    Mid1 - 3  the three stages before, by timm's `feature_info`; transformers, whose maps all have one size, after a
              quarter, half and three quarters of their blocks; without it, the last of the outermost modules that give
              a map of a size

An attribution's map must reach the logits. Behind the last attention of a transformer with a class token the patch
tokens do not: their gradient is 0. A depth is then the last layer before it whose patch tokens do.

Input × gradient also needs a map that the logits do not read through a layer norm of each position alone: such a norm
undoes a position's scale, so that the sum over its channels is 0 whatever is there, and the map is rounding. A depth is
then what the norm gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.models.cut import last_map
from debiaskd.models.depth_trial import ModuleRun, Trial, positions, run_trial
from debiaskd.models.layouts import Layout, LayoutError
from debiaskd.models.modules import named_module
from debiaskd.models.wrappers import unwrap

DEPTHS = ("Input", "Mid1", "Mid2", "Mid3", "Final")


@dataclass(frozen=True)
class Depth:
    """A place in a model: the module whose output it is, None for the images; and how that output is laid out."""

    module: str | None
    layout: Layout


def check_layer(model: nn.Module, layer: object) -> None:
    """A depth, or a name of one of the model's modules."""
    if layer not in DEPTHS:
        try:
            named_module("layer", "model", unwrap(model), layer)
        except ValueError as error:
            raise ValueError(f"{error}; or one of {', '.join(DEPTHS)}") from None


def find(model: nn.Module, layer: str, images: Tensor, *, reaching: bool = False, product: bool = False) -> Depth:
    """Where `layer` is in `model`.

    Args:
        model: any module; one image runs through a copy of it in eval mode.
        layer: one of DEPTHS, or a module's name.
        images: [N,3,H,W] that the model runs on, N ≥ 1.
        reaching: only a map that the logits depend on, as an attribution needs it; a gradient runs back to find out.
        product: and only one whose product with its gradient is not 0 at every position.

    Raises:
        ValueError: no such layer, or its output is no feature map, or it is none that the logits depend on, or its
            product with its gradient is 0.
    """
    if layer == "Input":
        return Depth(None, Layout())
    trial = run_trial(unwrap(model), images[:1].detach(), reaching)
    if layer not in DEPTHS:
        run = _checked(trial, trial.named(layer), layer)
        if not run.reaches:
            other = _last_usable(trial, run)
            raise ValueError(
                f"layer {layer!r} must give a map that the logits depend on, and those of {type(trial.model).__name__} "
                f"do not (a class token has been read by then); the last layer whose map they read is {other!r}"
            )
    elif layer == "Final":
        run = _final(trial)
    else:
        run = _stage(trial, DEPTHS.index(layer) - 1, layer)
    if product and run.cancels:
        run = _behind_norm(trial, run, layer)
    assert run.layout is not None
    return Depth(run.name, run.layout)


def _behind_norm(trial: Trial, run: ModuleRun, layer: str) -> ModuleRun:
    """What the norm gives that alone reads `run`, else an earlier map; refused where `run` itself was asked for."""
    place = trial.runs.index(run)
    behind = [r for r in _maps(trial, trial.runs[place + 1 :]) if _shape(trial, r) == _shape(trial, run)]
    found = next((r for r in behind if not r.cancels), None)
    if layer in DEPTHS:
        before = [r for r in _maps(trial, trial.runs[:place]) if not r.cancels]
        if found is not None or before:
            return found or _block_of(trial.model, before)
    other = "" if found is None else f"name what the norm gives, {found.name!r}, or "
    raise ValueError(
        f"layer {layer!r} must give a map whose product with its gradient is not 0 everywhere, and "
        f"{type(trial.model).__name__} reads {run.name!r} through a norm of each position "
        f"alone, which undoes its scale: {other}take attribution='grad_cam'"
    )


def _shape(trial: Trial, run: ModuleRun) -> torch.Size:
    assert run.layout is not None
    return run.layout.to_map(run.output, trial.images).shape


def _checked(trial: Trial, run: ModuleRun | None, name: str) -> ModuleRun:
    if run is None:
        raise ValueError(
            f"layer {name!r} must run in a forward pass and give one tensor, got a module that does not run or whose "
            "output is a tuple, list or dict; name a module inside it"
        )
    if run.times > 1:
        raise ValueError(f"layer {name!r} must run once in a forward pass, got one that runs {run.times} times")
    if run.layout is None:
        raise ValueError(
            f"layer {name!r} must give a feature map [N,C,H,W] (or [N,H,W,C], or a grid of tokens [N,L,C]), "
            f"got {list(run.output.shape)}: name the last layer before global pooling"
        )
    return run


def _final(trial: Trial) -> ModuleRun:
    if trial.final is not None:
        named = [run for run in trial.runs if run.output is trial.final and run.times == 1]
    else:
        named = _outermost([run for run in trial.runs if positions(run) > 1 and run.times == 1])
        with suppress(LayoutError):  # the last stage may lie deeper than the first layers
            last = trial.named(last_map("model", trial.model, trial.images))
            named = named if last is None else [last]
    if named and named[-1].usable:
        return named[-1]
    found = _last_usable(trial, named[-1] if named else None)
    if found is None and named:
        return _checked(trial, named[-1], named[-1].name)
    run = None if found is None else trial.named(found)
    if run is None:
        raise ValueError("layer 'Final' was not found: name the module that gives the last feature map")
    return run


def _maps(trial: Trial, runs: Sequence[ModuleRun]) -> list[ModuleRun]:
    """Those that nobody named and that can be maps nevertheless: of several positions, in the images' proportions."""
    height, width = trial.images.shape[-2:]
    found = []
    for run in runs:
        if not run.usable or positions(run) < 2:
            continue
        if run.output.dim() == 4:
            first = 1 if run.layout == Layout("NHWC") else 2
            rows, columns = run.output.shape[first : first + 2]
            if abs(rows * width - columns * height) > max(height, width):  # attention weights, for example
                continue
        found.append(run)
    return found


def _last_usable(trial: Trial, before: ModuleRun | None) -> str | None:
    """The last layer that gives a map of several positions which the logits depend on: a stage or a block if there is
    one, else whichever it is."""
    runs = trial.runs if before is None else trial.runs[: trial.runs.index(before)]
    usable = _maps(trial, runs)
    listed = set(_listed(trial.model))
    stages = [run for run in usable if run.name in listed]
    if stages:
        return stages[-1].name
    final = trial.final if before is None else before.output
    if isinstance(final, Tensor) and final.dim() == 3:  # queries, keys and attention weights have other widths
        usable = [run for run in usable if run.output.dim() == 3 and run.output.shape[2] == final.shape[2]] or usable
    return _block_of(trial.model, usable).name if usable else None


def _block_of(model: nn.Module, usable: list[ModuleRun]) -> ModuleRun:
    """The last of them, or the block before it in the same list of blocks: inside of a block there is no stage."""
    last = usable[-1]
    parts = last.name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        parent = ".".join(parts[:depth])
        if isinstance(model.get_submodule(parent), (nn.Sequential, nn.ModuleList)):
            blocks = [run for run in usable if run.name.rpartition(".")[0] == parent]
            if blocks:
                return blocks[-1]
    return last


def _outermost(runs: list[ModuleRun]) -> list[ModuleRun]:
    depth = min((run.name.count(".") for run in runs), default=0)
    return [run for run in runs if run.name.count(".") == depth]


def _stage(trial: Trial, number: int, layer: str) -> ModuleRun:
    stages = _stages(trial)
    if len(stages) < 4:
        raise ValueError(
            f"layer {layer!r} is not known in {type(trial.model).__name__}, which has the stages {stages or 'none'}: "
            "name a module"
        )
    name = stages[-4:][number]
    run = trial.named(name)
    if run is not None and run.usable:
        return run
    inside = _maps(trial, [run for run in trial.runs if run.name.startswith(f"{name}.")])
    if inside:  # of a stage that gives several tensors
        return _block_of(trial.model, inside)
    if run is not None and run.layout is not None and not run.reaches:
        found = _last_usable(trial, run)
        earlier = None if found is None else trial.named(found)
        if earlier is not None:
            return earlier
    return _checked(trial, run, name)


def _listed(model: nn.Module) -> list[str]:
    """Modules that timm's `feature_info` names."""
    info: Any = getattr(model, "feature_info", None)
    return [] if info is None else [entry["module"] for entry in getattr(info, "info", info) if "module" in entry]


def _stages(trial: Trial) -> Sequence[str]:
    model, runs, images = trial.model, trial.runs, trial.images
    info: Any = getattr(model, "feature_info", None)
    if info is not None:
        entries = list(getattr(info, "info", info))
        by_reduction = {entry["reduction"]: entry["module"] for entry in entries}  # the last of each
        if len(by_reduction) >= 4:
            return list(by_reduction.values())
        return [entries[-(-len(entries) * quarter // 4) - 1]["module"] for quarter in range(1, 5)] if entries else []
    maps = [run for run in runs if run.output.dim() == 4]
    sizes = {positions(run) for run in maps} - {0, 1, images.shape[2] * images.shape[3]}
    stages = []
    for size in sorted(sizes, reverse=True):
        stages += [run.name for run in _outermost([r for r in maps if positions(r) == size and r.times == 1])][-1:]
    return stages
