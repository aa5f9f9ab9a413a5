"""SyncBatchNorm made of operations that can be differentiated twice; PyTorch's own cannot."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.models.constant_gradient import Constant, over_channels


@contextmanager
def synchronised(model: nn.Module) -> Iterator[None]:
    """SyncBatchNorm made of operations that can be differentiated twice; PyTorch's own cannot."""
    changed = []
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training and _ranks(module) > 1:
            changed.append(module)
            module.forward = types.MethodType(_sync_batch_norm, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _ranks(module: nn.SyncBatchNorm) -> int:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size(module.process_group)


def _sync_batch_norm(module: Any, x: Tensor) -> Tensor:
    from torch.distributed.nn.functional import all_reduce

    group = module.process_group or torch.distributed.group.WORLD
    dims = [d for d in range(x.dim()) if d != 1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = wide.new_tensor(float(x.numel() // x.shape[1]))
    total = count.clone()
    torch.distributed.all_reduce(total, group=group)
    own_var, own_mean = torch.ops.aten.var_mean.correction(wide, dims, correction=0)
    mean = all_reduce(own_mean * (count / total), group=group)
    var = all_reduce((own_var + (own_mean - mean).square()) * (count / total), group=group)
    if module.track_running_stats and module.running_mean is not None:
        with torch.no_grad():
            module.num_batches_tracked.add_(1)
            momentum = module.momentum
            if momentum is None:
                momentum = 1.0 / float(module.num_batches_tracked)
            unbiased = var * (total / (total - 1))
            module.running_mean.lerp_(mean.to(module.running_mean.dtype), momentum)
            module.running_var.lerp_(unbiased.to(module.running_var.dtype), momentum)
    if torch.is_grad_enabled():
        mean, var = (Constant.apply(each) if each.requires_grad else each for each in (mean, var))
    scale = (var + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight
    shift = -mean * scale if module.bias is None else module.bias - mean * scale
    y = (wide * over_channels(scale, x) + over_channels(shift, x)).to(x.dtype)
    for name in ("drop", "act"):  # timm's SyncBatchNormAct
        if isinstance(getattr(module, name, None), nn.Module):
            y = getattr(module, name)(y)
    return y
