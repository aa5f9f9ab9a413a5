"""Find the last layers of a model, and their inputs, by running it.

The candidates are the layers that `get_classifier()` gives (one, or several whose outputs are averaged or weighted),
and every module whose output is the logits, from the outermost to the innermost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.models.cut import LayerError, _frames, same_memory
from debiaskd.models.modules import named_module, share

#: So many times PyTorch's standard deviation, a last layer's initial weights are too large.
LOUD = 4.0


@dataclass
class Reading:
    """Layers, and what each of them reads.

    Attributes:
        names: of the modules, in the order in which they run.
        kind: of the module, if it is one.
        shapes: of each one's input, without N.
        reads: for each, which of the distinct inputs.
        scale: None where the output of one layer is the logits; else the logits are a sum of several outputs.
    """

    names: list[str]
    kind: type[nn.Module] | None
    shapes: list[torch.Size]
    reads: list[int]
    scale: Tensor | None = None
    distinct: list[str] = field(default_factory=list)

    @property
    def widths(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    @property
    def distinct_shapes(self) -> list[torch.Size]:
        return [self.shapes[self.reads.index(i)] for i in range(len(self.distinct))]

    def scale_for(self, outputs: list[Tensor], logits: Tensor) -> Tensor:
        """The factors [len(names)] by which the outputs make the logits."""
        count = len(outputs)
        mean = torch.full((count,), 1 / count)
        if count == 1 or torch.allclose(torch.stack(outputs).mean(0), logits, rtol=1e-4, atol=1e-5):
            return mean.to(logits)
        columns = torch.stack([output.flatten() for output in outputs], 1).double()
        solved: Tensor = torch.linalg.lstsq(columns, logits.flatten()[:, None].double()).solution
        return solved[:, 0].to(logits)


def varied(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose constant tensors are none, so that zeros and ones hide no layer; others are shared."""
    twin = share(model).eval()
    generator, made = torch.Generator().manual_seed(7), {}
    for module in twin.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or not tensor.is_floating_point() or tensor.numel() < 2:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _varied(name, tensor.detach(), generator)
                new = made[id(tensor)]
                if new is not None:
                    store[name] = nn.Parameter(new, requires_grad=False) if store is module._parameters else new  # type: ignore[assignment]
    return twin


def _varied(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor | None:
    if not bool((tensor == tensor.flatten()[0]).all()):
        return None
    noise = 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor)
    return tensor + (noise.abs() if "var" in name else noise)


def checked_logits(role: str, logits: object) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{role} must give logits [N,K], got {got}")
    return logits


def classifiers_of(model: nn.Module) -> list[nn.Module]:
    """What `get_classifier()` gives, as a list; empty without it."""
    get_classifier: Any = getattr(model, "get_classifier", None)
    found = get_classifier() if callable(get_classifier) else None
    if isinstance(found, nn.Module) and not isinstance(found, (nn.ModuleList, nn.ModuleDict)):
        return [found]
    if isinstance(found, (dict, nn.ModuleDict)):
        found = list(found.values())
    return [part for part in found if isinstance(part, nn.Module)] if found is not None else []


def tame(layer: nn.Module) -> None:
    """Initialize a last layer as PyTorch does if its own initialization gives logits that are far too large.

    timm's EfficientNets, MobileNets and their relatives scale the last layer by the number of classes: with two, a
    pretrained network begins with a cross-entropy of 6 where ln 2 is expected, and with gradients 30 times as large
    (findings/timm_draws_a_new_head_by_its_number_of_classes.sh).
    """
    if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.weight.numel() > 1:
        expected = (3 * layer.weight[0].numel()) ** -0.5  # of PyTorch's uniform distribution
        if float(layer.weight.detach().std()) > LOUD * expected:
            layer.reset_parameters()


def readings(role: str, model: nn.Module, images: Tensor, name: str | None = None) -> list[Reading]:
    """The candidates for the last layers of a model in eval mode, from the outermost to the innermost.

    Args:
        role: of the model, in messages.
        model: from images to logits.
        images: that it runs on.
        name: of its last layer, where it is known: the only candidate then.

    Raises:
        ValueError: `name` names no module.
        TypeError: `get_classifier()` gives no layer that reads anything.
    """
    if name is not None:
        named_module("head", role, model, name)
    elif not (found := classifiers_of(model)) and callable(getattr(model, "get_classifier", None)):
        raise TypeError(f"head must be a layer, got {type(model.get_classifier()).__name__} from {role}")  # type: ignore[operator]
    elif found and all(isinstance(part, nn.Identity) for part in found):
        raise TypeError(f"head must be a layer that gives logits, got Identity from the {role}'s get_classifier()")
    runs, logits = _runs(model, images)
    checked_logits(role, logits)
    if name is not None:
        return [made for made in [_reading([name], runs, logits)] if made is not None]
    made = [_reading([n], runs, logits) for n in runs if same_memory(runs[n].output, logits)]
    outermost = sorted([r for r in made if r is not None], key=lambda r: r.names[0].count("."))
    known = {id(module): n for n, module in model.named_modules()}
    names = [known[id(part)] for part in found if id(part) in known]
    if len(names) > 1:
        several = _reading([n for n in runs if n in names], runs, logits, several=True)
        return [*outermost, *([] if several is None else [several])]
    return outermost


def last_layers(role: str, model: nn.Module, images: Tensor, name: str | None = None) -> Reading:
    """What the last layers of a model in eval mode read, without asking how its logits follow from them.

    Those of `get_classifier()`; else the innermost layer whose output is the logits; else the last `nn.Linear` that
    ran, of a model that changes its logits behind it.

    Raises:
        TypeError, ValueError: see `readings`; there is none of these.
    """
    if name is not None:
        named_module("head", role, model, name)
    runs, logits = _runs(model, images)
    expected = list(checked_logits(role, logits).shape)
    output = runs[name].output if name in runs else None
    if isinstance(output, Tensor) and (output.dim() < 2 or list(output.flatten(1).shape) != expected):
        raise ValueError(
            f"head must name a layer of the {role} that gives one number a class, [N,K]={expected}, got {name!r}, "
            f"which gives {list(output.shape)}"
        )
    known = {id(module): n for n, module in model.named_modules()}
    given = [known[id(part)] for part in classifiers_of(model) if id(part) in known]
    ending = [n for n in runs if same_memory(runs[n].output, logits)]
    linear = [n for n in runs if isinstance(runs[n].module, nn.Linear)]
    innermost = sorted(ending, key=lambda n: n.count("."))[-1:]
    for names in [[name]] if name is not None else [[n for n in runs if n in given], innermost, linear[-1:]]:
        found = _reading(names, runs, logits, several=len(names) > 1)
        if found is not None:
            return found
    if name is not None:
        raise ValueError(f"head must name a layer of the {role} that runs once and reads one tensor, got {name!r}")
    raise ValueError(f"{role} must end in layers that read one tensor each, got {type(model).__name__} with none found")


@dataclass
class _Run:
    module: nn.Module
    input: Any
    output: Any
    times: int = 1


def _runs(model: nn.Module, images: Tensor) -> tuple[dict[str, _Run], Any]:
    """Every module that ran, in the order in which they ended, and what the model gave."""
    copied = share(model).eval()
    runs: dict[str, _Run] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            times = runs.pop(name).times + 1 if name in runs else 1
            runs[name] = _Run(module, arguments[0] if len(arguments) == 1 else None, output, times)

        return hook

    for name, module in copied.named_modules():
        if name:
            module.register_forward_hook(note(name))
    with torch.no_grad():
        logits = copied(images)
    return runs, logits


def _reading(names: list[str], runs: dict[str, _Run], logits: Any, several: bool = False) -> Reading | None:
    used = [runs[name] for name in names if name in runs and runs[name].times == 1]
    if not names or len(used) < len(names) or not all(isinstance(run.input, Tensor) for run in used):
        return None
    inputs = [run.input for run in used]
    if any(x.dim() < 2 or len(x) != len(logits) for x in inputs):
        return None
    firsts = [next(i for i, x in enumerate(inputs) if same_memory(x, y) and x.shape == y.shape) for y in inputs]
    distinct = sorted(set(firsts))
    return Reading(
        names,
        type(used[0].module) if len(used) == 1 else None,
        [x.shape[1:] for x in inputs],
        [distinct.index(first) for first in firsts],
        torch.ones(len(used)) if several else None,
        [names[i] for i in distinct],
    )


def _catch_input(module: nn.Module, arguments: Any) -> None:
    if _frames.stack:
        _frames.stack[-1].append(arguments[0])


class ReadInputs(nn.Module):
    """`forward(images)` gives what the named layers of `model` read, one after another: `z`, [N,D]."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(_catch_input)

    def forward(self, images: Tensor) -> Tensor:
        caught: list[Tensor] = []
        _frames.stack.append(caught)
        try:
            self.model(images)
        finally:
            _frames.stack.pop()
        if len(caught) != len(self.names):
            raise LayerError(f"layers {self.names} must run once each in a forward pass, they ran {len(caught)} times")
        return torch.cat([part.flatten(1) for part in caught], 1)


def reading(model: nn.Module, r: Reading, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """(z [N,D], each layer's output [N,K], the logits) of a model in eval mode."""
    runs, logits = _runs(model, images)
    z = torch.cat([runs[name].input.flatten(1) for name in r.distinct], 1)
    return z, [runs[name].output.flatten(1) for name in r.names], logits
