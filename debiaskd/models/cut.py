"""Cut a model into its body, up to the last feature map before global pooling, and its head.

A model with timm's protocol (`forward_features`, `forward_head`, `get_classifier`) is cut where the protocol
cuts it. Any other module is cut at a named layer: the whole forward runs, the layer's output is captured, and layers
that are only used after it are removed from the copy. Nothing is traced, so control flow and train/eval behaviour are
unchanged, and `torch.export` and `torch.compile` see ordinary Python.

Every cut is tested on one small input: in eval mode, without gradients, on a copy that shares the tensors, with its own
random numbers. The original model keeps its mode, buffers and gradients.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from debiaskd.models.layouts import Layout, LayoutError, layout_of, like
from debiaskd.models.modules import has_protocol, named_module, share
from debiaskd.models.trial_inputs import candidate_inputs, input_of, no_input, runnable


class LayerError(ValueError):
    """The named layer has no single output in a forward pass."""


class _Frames(threading.local):
    """One stack a thread: two threads that run one model must not catch each other's maps."""

    def __init__(self) -> None:
        self.stack: list[list[Tensor]] = []


_frames = _Frames()


def _catch(module: nn.Module, arguments: Any, output: Tensor) -> None:
    # Outside of a Body's forward the stack is empty: activation checkpointing calls layers again during backward.
    if _frames.stack:
        _frames.stack[-1].append(output)


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
    uses = Uses()
    body = Body(share(model), layer).eval()
    with torch.no_grad(), uses:
        images, raw = _trial(role, body, example)
        body.layout = layout_of(role, model, raw, images)
        expected = body.layout.to_map(raw, images)
    if not bool(torch.isfinite(expected).all()):
        raise ValueError(f"{role} must give a finite feature map, got NaN or infinity on random input")
    try:
        body = _without_the_rest(role, model, body, uses.seen, prune, images, expected)
    except ValueError:  # code behind the map runs, too, and wants its tensors
        body = _without_the_rest(role, model, body, uses.seen, demote, images, expected)
    return Cut(role, model, body, images, raw, expected.shape[1], bool((expected >= 0).all()))


def _without_the_rest(
    role: str,
    model: nn.Module,
    tried: Body,
    used: set[int],
    take: Callable[[nn.Module, set[int]], None],
    images: Tensor,
    expected: Tensor,
) -> Body:
    """A body without parameters that its map does not need, tried, and in the modes of `model`."""
    body = Body(share(model), tried.layer)
    body.layout, body.training = tried.layout, model.training
    modes = [(module, module.training) for module in body.modules()]
    take(body.eval().model, used)
    _confirm(role, body, images, expected)
    for module, training in modes:
        module.training = training
    return body


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
    for images in candidate_inputs(body.model, example):
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
        raise no_input(role, example, errors) from errors[0]
    return ran[-1]


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


def demote(module: nn.Module, used: set[int]) -> None:
    """Make buffers of all parameters that are not used: what code behind the map reads is kept, and not trained."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and id(parameter) not in used:
                del part._parameters[name]
                part.register_buffer(name, made.setdefault(id(parameter), parameter.detach()))


def demote_unreached(body: Body, images: Tensor) -> None:
    """Make buffers of parameters that get no gradient from the map: branches that another head reads."""
    parameters = [p for p in body.parameters() if p.requires_grad]
    with torch.enable_grad():
        feature = share(body).eval()(images)  # what layers cache hangs on the graph: it stays in the copy
        got = torch.autograd.grad(feature.sum(), parameters, allow_unused=True) if feature.requires_grad else []
    reached = {id(p) for p, gradient in zip(parameters, got) if gradient is not None}
    reached |= {id(p) for p in body.parameters() if not p.requires_grad or not got}
    demote(body, reached)


def last_map(role: str, model: nn.Module, example: Tensor | None = None) -> str:
    """The name of the module that gives a model's last feature map, where nothing else says which it is.

    What the last layers make of a map is none, such as the scores of a 1×1 convolution before pooling.

    Raises:
        LayoutError: no module gives a map.
    """
    images = input_of(role, model, example, large=True)  # on a small one, the last map may have one position
    copied, found = share(model).eval(), dict[str, list[Any]]()

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            found[name] = [*found.pop(name, []), output]

        return hook

    for name, module in copied.named_modules():
        if name:
            module.register_forward_hook(note(name))
    with torch.no_grad():
        logits = copied(images)
    ends = [name for name, outputs in found.items() if same_memory(outputs[-1], logits)]
    maps = {
        name: outputs[0]
        for name, outputs in found.items()
        if len(outputs) == 1
        and not any(name == end or name.startswith(f"{end}.") for end in ends)
        and _is_map(role, model, outputs[0], images)
    }
    if not maps:
        raise LayoutError(f"layer must name the {role}'s last feature map: no module of it gives one that was found")
    last = maps[list(maps)[-1]]
    return min((name for name, output in maps.items() if output is last), key=lambda name: name.count("."))


def same_memory(output: Any, logits: Any) -> bool:
    """The same values in the same memory, be it as a view."""
    both = isinstance(output, Tensor) and isinstance(logits, Tensor)
    return both and output.numel() == logits.numel() and output.data_ptr() == logits.data_ptr()


def _is_map(role: str, model: nn.Module, output: Any, images: Tensor) -> bool:
    if not isinstance(output, Tensor) or output.dim() not in (3, 4) or len(output) != len(images):
        return False
    try:
        feature = layout_of(role, model, output, images).to_map(output, images)
    except LayoutError:
        return False
    height, width = feature.shape[2:]
    return height * width > 1 and like(images, height, width)  # attention's [N,heads,L,L] has other proportions


def close(actual: Tensor, expected: Tensor) -> bool:
    """Alike up to rounding, relative to the largest value."""
    if actual.shape != expected.shape:
        return False
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())
