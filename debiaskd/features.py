"""A model in two pieces: its body, up to the last feature map before global pooling, and its head behind that map.

A model that speaks timm's protocol (`forward_features`, `forward_head`, `get_classifier`) is cut where the protocol
cuts it. Any other module is cut at a named layer: the whole forward runs, the layer's output is caught, and layers
that only matter behind it are taken out of the copy. Nothing is traced, so control flow and train/eval behaviour
stay the model's own, and `torch.export` and `torch.compile` see ordinary Python.

Every cut is tried on one small input when it is made: in eval mode, without gradients, on a copy that shares the
tensors, with random numbers of its own. The model that came in keeps its mode, buffers and gradients.
"""

from __future__ import annotations

import copy
import difflib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from debiaskd import checks
from debiaskd.batch_statistics import caches


class LayerError(ValueError):
    """The named layer has no single output in a forward pass."""


class LayoutError(ValueError):
    """An output that is no feature map."""


class _Frames(threading.local):
    """One stack a thread: two threads that run one model must not catch each other's maps."""

    def __init__(self) -> None:
        self.stack: list[list[Tensor]] = []


_frames = _Frames()


def _catch(module: nn.Module, arguments: Any, output: Tensor) -> None:
    # Outside of a Body's forward the stack is empty: activation checkpointing calls layers again during backward.
    if _frames.stack:
        _frames.stack[-1].append(output)


@dataclass(frozen=True)
class Layout:
    """How a model lays out its last features, and the way to [N,C,H,W] and back."""

    axes: str = "NCHW"
    prefix: int = 0
    stride: int = 1

    def to_map(self, raw: Tensor, images: Tensor) -> Tensor:
        if self.axes == "NCHW":
            return raw
        if self.axes == "NHWC":
            return raw.permute(0, 3, 1, 2)
        tokens = raw[:, self.prefix :].transpose(1, 2)
        height, width = images.shape[-2] // self.stride, images.shape[-1] // self.stride
        return tokens.reshape(tokens.shape[0], tokens.shape[1], height, width)

    def from_map(self, feature: Tensor) -> Tensor:
        if self.axes == "NCHW":
            return feature
        if self.axes == "NHWC":
            return feature.permute(0, 2, 3, 1)
        tokens = feature.flatten(2).transpose(1, 2)
        return torch.cat([tokens.new_zeros(tokens.shape[0], self.prefix, tokens.shape[2]), tokens], dim=1)


class Body(nn.Module):
    """`forward(images)` gives the feature map [N,C,H,W] of `model`, at `layer` or by timm's protocol."""

    def __init__(self, model: nn.Module, layer: str | None) -> None:
        super().__init__()
        self.model = model
        self.layer = layer
        self.layout = Layout()
        if layer is not None:
            model.get_submodule(layer).register_forward_hook(_catch)

    def raw(self, images: Tensor) -> Any:
        if self.layer is None:
            model: Any = self.model
            return model.forward_features(images)
        caught: list[Tensor] = []
        _frames.stack.append(caught)
        try:
            self.model(images)
        finally:
            _frames.stack.pop()
        if len(caught) != 1:
            raise LayerError(f"layer {self.layer!r} must run once in a forward pass, it ran {len(caught)} times")
        return caught[0]

    def forward(self, images: Tensor) -> Tensor:
        return self.layout.to_map(self.raw(images), images)


@dataclass
class Cut:
    """`model` cut at its feature map, with what the trial run gave.

    `body` is a copy on the tensors of `model`, without the layers that its map does not need. `raw` is its output
    for `images` in the model's own layout, `channels` the width of its map, `nonnegative` whether no value of the
    map lies below zero.
    """

    role: str
    model: nn.Module
    body: Body
    images: Tensor
    raw: Tensor
    channels: int
    nonnegative: bool


def has_protocol(model: nn.Module) -> bool:
    return all(callable(getattr(model, name, None)) for name in ("forward_features", "forward_head", "get_classifier"))


def share(model: nn.Module) -> nn.Module:
    """A copy of the structure on the same parameters and buffers: what is done to its modules leaves the model be."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # what a layer caches may hang on a graph, which cannot be copied
        memo.update({id(vars(module)[name]): {} for name in caches(module)})
    return copy.deepcopy(model, memo)


def named_module(argument: str, role: str, model: nn.Module, name: object) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a module name of the {role}, got {type(name).__name__}")
    if name not in modules or name == "":
        close = difflib.get_close_matches(name, modules, 3) or [child for child, _ in model.named_children()][:12]
        pair = "; where the names differ, pass (teacher's, student's)" if role == "student" else ""
        raise ValueError(
            f"{argument} must name a module of the {role}, got {name!r}; did you mean one of {close}?{pair}"
        )
    return modules[name]


def cut(role: str, model: object, layer: str | None = None, example: Tensor | None = None) -> Cut:
    """Cut `model`, called `role` in messages, at `layer` (None: by its protocol).

    Raises:
        TypeError: `model` is not a module, `layer` not a name, `example` not a tensor.
        ValueError: no such layer, no way to run the model, or no feature map there; the message says which.
    """
    model = runnable(role, model)
    if layer is not None:
        named_module("layer", role, model, layer)
    elif not has_protocol(model):
        raise ValueError(
            f"layer must name the {role}'s last feature map, because {type(model).__name__} lacks timm's "
            "forward_features, forward_head and get_classifier; got None"
        )
    body = Body(share(model), layer)
    body.training = model.training
    modes = [(module, module.training) for module in body.modules()]
    uses = Uses()
    with torch.no_grad(), uses:
        images, raw = _trial(role, body.eval(), example)
        body.layout = layout_of(role, model, raw, images)
        expected = body.layout.to_map(raw, images)
    if not bool(torch.isfinite(expected).all()):
        raise ValueError(f"{role} must give a finite feature map, got NaN or infinity on random input")
    prune(body.model, uses.seen)
    _confirm(role, body, images, expected)
    for module, training in modes:
        module.training = training
    return Cut(role, model, body, images, raw, expected.shape[1], bool((expected >= 0).all()))


def runnable(role: str, model: object) -> nn.Module:
    """The model, if it is a module that holds values."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{role} must be a torch.nn.Module, got {type(model).__name__}")
    if any(tensor.is_meta or is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(f"{role} must hold values, got parameters on the meta device or of lazy layers")
    return model


def input_of(role: str, model: nn.Module, example: Tensor | None = None) -> Tensor:
    """A small input [1,...] that `model`, called `role` in messages, runs on in eval mode.

    Raises:
        ValueError: no usual size runs, or `example` does not.
    """
    copied, errors = share(model).eval(), []
    for images in _inputs(model, example):
        try:
            with torch.no_grad():
                copied(images)
        except Exception as error:  # a guessed size may fail in whatever way the model likes
            errors.append(error)
        else:
            return images
    raise _no_input(role, example, errors) from errors[0]


def _no_input(role: str, example: Tensor | None, errors: list[Exception]) -> ValueError:
    got = "none, and no usual size runs" if example is None else f"shape {list(example.shape)}"
    reason = f"{type(errors[0]).__name__}: {errors[0]}"
    return ValueError(f"example must be an input that the {role} runs on, got {got} ({reason})")


def _confirm(role: str, body: Body, images: Tensor, expected: Tensor) -> None:
    advice = f"layer of the {role}: the code behind it needs layers that are not part of the features"
    try:
        with torch.no_grad():
            same = close(body(images), expected)
    except Exception as error:
        raise ValueError(f"{advice} ({error}); give the {role} timm's forward_features instead") from error
    if not same:
        raise ValueError(f"{advice}, or the {role} gives another map each time it runs in eval mode")


def _trial(role: str, body: Body, example: Tensor | None) -> tuple[Tensor, Tensor]:
    errors: list[Exception] = []
    ran: list[tuple[Tensor, Tensor]] = []
    for images in _inputs(body.model, example):
        try:
            raw = body.raw(images)
        except LayerError:
            raise
        except Exception as error:  # a guessed size may fail in whatever way the model likes
            errors.append(error)
            continue
        if not isinstance(raw, Tensor):
            raise LayoutError(f"layer of the {role} must give one tensor, got {type(raw).__name__}")
        ran.append((images, raw))
        # A map of a single position could not tell one kind of pooling from another.
        if raw.dim() != 4 or raw.shape[-1] * raw.shape[-2] * raw.shape[-3] > max(raw.shape[-3:]):
            break
    if not ran:
        raise _no_input(role, example, errors) from errors[0]
    return ran[-1]


def _inputs(model: nn.Module, example: Tensor | None) -> Iterator[Tensor]:
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
    for size in [tuple(fixed)] if fixed else [(64, 64), tuple(usual[1:]), (224, 224), (32, 32), (28, 28)]:
        for count in channels:
            yield torch.randn(1, count, *size, generator=generator).to(like)


def layout_of(role: str, model: nn.Module, raw: Tensor, images: Tensor) -> Layout:
    if raw.dim() == 4:
        first, second, third = raw.shape[1:]
        named = third == getattr(model, "num_features", None) != first
        looks = _like(images, first, second) and not _like(images, second, third)
        return Layout("NHWC") if named or looks else Layout()
    if raw.dim() == 3:
        named = int(getattr(model, "num_prefix_tokens", 0))
        for prefix in dict.fromkeys([named, 0, 1, 2]):  # not every model counts its class token
            positions = raw.shape[1] - prefix
            stride = math.isqrt(images.shape[-1] * images.shape[-2] // max(positions, 1))
            if stride and (images.shape[-2] // stride) * (images.shape[-1] // stride) == positions:
                return Layout("NLC", prefix, stride)
    raise LayoutError(
        f"layer of the {role} must give a feature map [N,C,H,W] (or [N,H,W,C], or a grid of tokens [N,L,C]), "
        f"got {list(raw.shape)}: name the last layer before global pooling"
    )


def _like(images: Tensor, height: int, width: int) -> bool:
    """Whether a map of this size has the proportions of the images, up to one row or column of rounding."""
    if images.dim() != 4:
        return False
    return abs(height * images.shape[-1] - width * images.shape[-2]) <= max(images.shape[-2:])


class Uses(TorchDispatchMode):
    """Which tensors computations read; by operator, because attention layers read weights of layers never called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _frames.stack and _frames.stack[-1]:  # the map is caught: what follows is the head's
            return func(*args, **(kwargs or {}))
        self.seen.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def prune(module: nn.Module, used: set[int]) -> None:
    """Take out every submodule that owns tensors of which none is used; layers without tensors stay."""
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        tensors = {id(tensor) for tensor in (*child.parameters(), *child.buffers())}
        if tensors and not tensors & used:
            setattr(module, name, nn.Identity().train(child.training))
        else:
            prune(child, used)
    if next(module.children(), None) is not None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in used:
                module.register_parameter(name, None)


def close(actual: Tensor, expected: Tensor) -> bool:
    """Alike up to rounding, relative to the largest value."""
    if actual.shape != expected.shape:
        return False
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())
