"""The layers at which a model is looked at: by name, or as Input, Mid1, Mid2, Mid3 and Final.

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

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from debiaskd.models.cut import last_map, named_module, share
from debiaskd.models.layouts import Layout, LayoutError, layout_of

DEPTHS = ("Input", "Mid1", "Mid2", "Mid3", "Final")


@dataclass(frozen=True)
class Depth:
    """A place in a model: the module whose output it is, None for the images; and how that output is laid out."""

    module: str | None
    layout: Layout


@dataclass
class _Run:
    """A module that gave a tensor; `layout` is None where that is no map, `reaches` False where logits ignore it."""

    name: str
    output: Tensor
    times: int = 1
    layout: Layout | None = None
    reaches: bool = True
    cancels: bool = False  # input × gradient is 0 at every position

    @property
    def usable(self) -> bool:
        return self.times == 1 and self.layout is not None and self.reaches


@dataclass
class _Trial:
    """One image's run through a copy of a model: its modules in the order in which they gave a tensor."""

    model: nn.Module
    images: Tensor
    runs: list[_Run] = field(default_factory=list)
    final: Tensor | None = None

    def named(self, name: str) -> _Run | None:
        return next((run for run in self.runs if run.name == name), None)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, inside of DistributedDataParallel, torch.compile or Lightning Fabric's wrapper."""
    inner: Any = model
    while True:
        if "_original_module" in inner._modules:  # Fabric's passes every other attribute on
            wrapped = inner._modules["_original_module"]
        else:
            wrapped = inner._modules.get("_orig_mod")
        if wrapped is None and isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            wrapped = inner.module
        if wrapped is None:
            return inner  # type: ignore[no-any-return]
        inner = wrapped


def as_read(model: nn.Module, images: Tensor) -> Tensor:
    """In the precision of the model's parameters, as what wraps a model passes them on."""
    return images.to(next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype))


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
    trial = _run(unwrap(model), images[:1].detach(), reaching)
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


def _behind_norm(trial: _Trial, run: _Run, layer: str) -> _Run:
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


def _shape(trial: _Trial, run: _Run) -> torch.Size:
    assert run.layout is not None
    return run.layout.to_map(run.output, trial.images).shape


def _checked(trial: _Trial, run: _Run | None, name: str) -> _Run:
    if run is None or run.times > 1:
        times = 0 if run is None else run.times
        raise ValueError(f"layer {name!r} must run once in a forward pass and give one tensor, it did {times} times")
    if run.layout is None:
        raise ValueError(
            f"layer {name!r} must give a feature map [N,C,H,W] (or [N,H,W,C], or a grid of tokens [N,L,C]), "
            f"got {list(run.output.shape)}: name the last layer before global pooling"
        )
    return run


def _run(model: nn.Module, image: Tensor, reaching: bool) -> _Trial:
    copied: Any = share(model).eval()
    if reaching:
        _awake(copied)
        _without_eps(copied)
    runs: dict[str, _Run] = {}
    trial = _Trial(model, image)

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                times = runs.pop(name).times + 1 if name in runs else 1
                runs[name] = _Run(name, output, times)

        return hook

    for name, module in copied.named_modules():
        if name:
            module.register_forward_hook(note(name))
    # In float16 a gradient that is small would be none at all.
    precise = torch.autocast(image.device.type, enabled=False)
    with torch.inference_mode(False), torch.set_grad_enabled(reaching), precise:
        given = as_read(model, image.clone()).requires_grad_(reaching).clone()  # which a model may change in place
        if callable(getattr(copied, "forward_features", None)) and callable(getattr(copied, "forward_head", None)):
            trial.final = copied.forward_features(given)
            logits = copied.forward_head(trial.final)
        else:
            logits = copied(given)
    trial.runs = list(runs.values())
    for run in trial.runs:
        run.layout = _layout(model, run.output, image)
    if reaching:
        _note_reach(trial, logits)
    return trial


def _awake(copied: nn.Module) -> None:
    """Zeros replaced by random numbers: a head or a branch that begins at zero hides what will reach the logits.

    So are scales that begin at nearly zero, CaiT's 1e-5: all but the identity would look like rounding.
    """
    generator = torch.Generator().manual_seed(0)
    for module in copied.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_floating_point() and parameter.numel() and bool((parameter.abs() < 1e-3).all()):
                value = 0.02 * torch.randn(parameter.shape, generator=generator)
                setattr(module, name, nn.Parameter(value.to(parameter), requires_grad=parameter.requires_grad))


def _without_eps(copied: nn.Module) -> None:
    """Norms of activations that are small, as before training, are otherwise ruled by their eps."""
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in copied.parameters()):
        return
    for module in copied.modules():
        if not isinstance(module, _BatchNorm) and isinstance(getattr(module, "eps", None), float):
            setattr(module, "eps", 1e-12)  # noqa: B010 (which is no buffer)


def _layout(model: nn.Module, output: Tensor, images: Tensor) -> Layout | None:
    """None if it is no map. Tokens are one of several positions; how many more there are differs between layers."""
    if len(output) != len(images):
        return None
    if output.dim() == 4:
        return layout_of("model", model, output, images)
    if output.dim() != 3:
        return None
    height, width = images.shape[-2:]
    for prefix in (int(getattr(model, "num_prefix_tokens", 0)), 0, 1, 2, 5):
        positions = output.shape[1] - prefix
        stride = math.isqrt(height * width // max(positions, 1))
        if positions > 1 and stride and (height // stride) * (width // stride) == positions:
            return Layout("NLC", prefix, stride)
    return None


def _note_reach(trial: _Trial, logits: object) -> None:
    maps = [run for run in trial.runs if run.layout is not None and run.output.requires_grad]
    if not maps or not isinstance(logits, Tensor) or not logits.requires_grad:
        return
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(logits.shape, generator=generator).to(logits)
    try:
        gradients = torch.autograd.grad(logits, [run.output for run in maps], upstream, allow_unused=True)
    except RuntimeError:  # not differentiable: what asks for a gradient will say so
        return
    for run, gradient in zip(maps, gradients):
        assert run.layout is not None
        if gradient is None:
            run.reaches = False
            continue
        gradient = run.layout.to_map(gradient, trial.images)
        run.reaches = bool(gradient.any())
        if gradient.dtype in (torch.float32, torch.float64) and _positions(run) > 1:
            parts = gradient.double() * run.layout.to_map(run.output.detach(), trial.images).double()
            # Rounding leaves 1e-8 to 1e-6 of it; maps that do not cancel have 1e-3 at the least.
            run.cancels = run.reaches and bool(parts.sum(1).abs().sum() < 1e-5 * parts.abs().sum())
    if not any(run.reaches for run in maps):  # dead at the moment, which says nothing
        for run in maps:
            run.reaches = True


def _final(trial: _Trial) -> _Run:
    if trial.final is not None:
        named = [run for run in trial.runs if run.output is trial.final and run.times == 1]
    else:
        named = _outermost([run for run in trial.runs if _positions(run) > 1 and run.times == 1])
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


def _maps(trial: _Trial, runs: Sequence[_Run]) -> list[_Run]:
    """Those that nobody named and that can be maps nevertheless: of several positions, in the images' proportions."""
    height, width = trial.images.shape[-2:]
    found = []
    for run in runs:
        if not run.usable or _positions(run) < 2:
            continue
        if run.output.dim() == 4:
            first = 1 if run.layout == Layout("NHWC") else 2
            rows, columns = run.output.shape[first : first + 2]
            if abs(rows * width - columns * height) > max(height, width):  # attention weights, for example
                continue
        found.append(run)
    return found


def _last_usable(trial: _Trial, before: _Run | None) -> str | None:
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


def _block_of(model: nn.Module, usable: list[_Run]) -> _Run:
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


def _outermost(runs: list[_Run]) -> list[_Run]:
    depth = min((run.name.count(".") for run in runs), default=0)
    return [run for run in runs if run.name.count(".") == depth]


def _positions(run: _Run) -> int:
    if run.layout is None:
        return run.output.shape[2] * run.output.shape[3] if run.output.dim() == 4 else 0
    if run.layout.axes == "NLC":
        return run.output.shape[1] - run.layout.prefix
    first = 2 if run.layout.axes == "NCHW" else 1
    return run.output.shape[first] * run.output.shape[first + 1]


def _stage(trial: _Trial, number: int, layer: str) -> _Run:
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


def _stages(trial: _Trial) -> Sequence[str]:
    model, runs, images = trial.model, trial.runs, trial.images
    info: Any = getattr(model, "feature_info", None)
    if info is not None:
        entries = list(getattr(info, "info", info))
        by_reduction = {entry["reduction"]: entry["module"] for entry in entries}  # the last of each
        if len(by_reduction) >= 4:
            return list(by_reduction.values())
        return [entries[-(-len(entries) * quarter // 4) - 1]["module"] for quarter in range(1, 5)] if entries else []
    maps = [run for run in runs if run.output.dim() == 4]
    sizes = {_positions(run) for run in maps} - {0, 1, images.shape[2] * images.shape[3]}
    stages = []
    for size in sorted(sizes, reverse=True):
        stages += [run.name for run in _outermost([r for r in maps if _positions(r) == size and r.times == 1])][-1:]
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
