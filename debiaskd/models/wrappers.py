"""Run a wrapped model: unwrap it, catch a layer's output, freeze running statistics."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


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
