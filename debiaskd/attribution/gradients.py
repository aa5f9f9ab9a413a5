"""Gradients of class logits at a feature map, one image's logit at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from debiaskd.models.constant_gradient import attribution_gradient
from debiaskd.utils import checks

#: A logit's gradient at one of many positions is smaller than float16 knows numbers. A loss scaler does not help: it
#: scales the loss, and this gradient is computed before there is one.
HALF_SCALE = 1024.0


def check_target(target: Tensor, count: int, classes: int) -> None:
    if checks.tensor("target", target).dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    if target.dim() == 2:
        checks.shape("target", target, "[N,T]", [count, target.shape[1]])
        if not target.shape[1]:
            raise ValueError("target must name at least one class an image, got shape [N,T] with T = 0")
    else:
        checks.shape("target", target, "[N]", [count])
    if checks.readable(target):
        low, high = (int(bound) for bound in torch.aminmax(target))
        if low < 0 or high >= classes:
            raise ValueError(f"target must lie in [0,K)=[0,{classes}), got values in [{low}, {high}]")
    message = f"target must lie in [0,K)=[0,{classes})"
    checks.on_device(target, lambda: ((target >= 0) & (target < classes)).all(), message)


def logit_gradients(logits: Tensor, feature: Tensor, target: Tensor, *, create_graph: bool = False) -> list[Tensor]:
    """The gradients of each image's target logits at `feature`, of any shape [N,...]: one for each class asked for.

    Images count as independent of each other: the model must have run within `constant_statistics` if it normalizes by
    statistics of the batch. Arguments and errors as `input_x_gradient`. Of float16 logits they are float32.
    """
    gradients, scale = scaled_gradients(logits, feature, target, create_graph=create_graph)
    if scale == 1:
        return gradients
    with torch.set_grad_enabled(create_graph):
        return [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale for gradient in gradients]


def scaled_gradients(
    logits: Tensor, feature: Tensor, target: Tensor, *, create_graph: bool = False, alone: bool = False
) -> tuple[list[Tensor], float]:
    """`logit_gradients` as they come, and how many times too large they are: `HALF_SCALE` in float16, else 1.

    Args:
        logits, feature, target, create_graph: as `input_x_gradient`.
        alone: one backward pass per image, through the batch's statistics: the reference that holds nothing constant.
    """
    checks.rank("logits", checks.floating("logits", logits), "[N,K]")
    checks.shape("logits", logits, "[N,K]", [len(feature), logits.shape[1]])
    if not feature.requires_grad:
        raise ValueError("feature must require grad and be what the logits were computed from, got one without grad")
    check_target(target, len(feature), logits.shape[1])
    columns = target.unbind(1) if target.dim() == 2 else (target,)
    scale = HALF_SCALE if _in_float16(logits) else 1.0
    gradients = []
    for column in columns:
        score = logits.gather(1, column[:, None])
        upstream = torch.full_like(score, scale)
        found = (_alone if alone else attribution_gradient)(score, feature, upstream, create_graph=create_graph)
        if found is None:
            raise ValueError("feature must be what the logits were computed from, got logits that do not depend on it")
        gradients.append(found)
    return gradients, scale


def _alone(score: Tensor, feature: Tensor, upstream: Tensor, *, create_graph: bool) -> Tensor | None:
    rows = []
    for i in range(len(score)):
        (found,) = torch.autograd.grad(
            score[i], feature, upstream[i], create_graph=create_graph, retain_graph=True, allow_unused=True
        )
        if found is None:
            return None
        rows.append(found[i])
    return torch.stack(rows) if rows else torch.zeros_like(feature)


def _in_float16(logits: Tensor) -> bool:
    device = logits.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return logits.dtype == torch.float16 or autocast
