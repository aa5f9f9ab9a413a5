"""Run one image through a copy of a model and record the output of every module."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from debiaskd.models.layouts import Layout, layout_of
from debiaskd.models.modules import share
from debiaskd.models.wrappers import as_read


@dataclass
class ModuleRun:
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
class Trial:
    """One image's run through a copy of a model: its modules in the order in which they gave a tensor."""

    model: nn.Module
    images: Tensor
    runs: list[ModuleRun] = field(default_factory=list)
    final: Tensor | None = None

    def named(self, name: str) -> ModuleRun | None:
        return next((run for run in self.runs if run.name == name), None)


def run_trial(model: nn.Module, image: Tensor, reaching: bool) -> Trial:
    copied: Any = share(model).eval()
    if reaching:
        _awake(copied)
        _without_eps(copied)
    runs: dict[str, ModuleRun] = {}
    trial = Trial(model, image)

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                times = runs.pop(name).times + 1 if name in runs else 1
                runs[name] = ModuleRun(name, output, times)

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
        run.layout = map_layout(model, run.output, image)
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


def map_layout(model: nn.Module, output: Tensor, images: Tensor) -> Layout | None:
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


def _note_reach(trial: Trial, logits: object) -> None:
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
        if gradient.dtype in (torch.float32, torch.float64) and positions(run) > 1:
            parts = gradient.double() * run.layout.to_map(run.output.detach(), trial.images).double()
            # Rounding leaves 1e-8 to 1e-6 of it; maps that do not cancel have 1e-3 at the least.
            run.cancels = run.reaches and bool(parts.sum(1).abs().sum() < 1e-5 * parts.abs().sum())
    if not any(run.reaches for run in maps):  # dead at the moment, which says nothing
        for run in maps:
            run.reaches = True


def positions(run: ModuleRun) -> int:
    if run.layout is None:
        return run.output.shape[2] * run.output.shape[3] if run.output.dim() == 4 else 0
    if run.layout.axes == "NLC":
        return run.output.shape[1] - run.layout.prefix
    first = 2 if run.layout.axes == "NCHW" else 1
    return run.output.shape[first] * run.output.shape[first + 1]
