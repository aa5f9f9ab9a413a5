"""Map cosine: the student's attribution map pulled to the teacher's, by the cosine of the angle between them.

Formula, for maps s_i and t_i of sample i where they meet, at the larger of their sizes:

    c_i  = <s_i, t_i> / (|s_i| |t_i|)         0 where either map is all zeros
    mean = sum_i w_i (1 - c_i) / sum_i w_i    (w_i = 1 without weight; 0 where nothing has weight)
    sum  = sum_i w_i (1 - c_i)
    none = [w_1 (1 - c_1), ..., w_N (1 - c_N)]

Gradient, with the upstream gradient g and the factor f_i of 1 - c_i above:

    dL/ds_i = -g_i f_i (t_i / (|s_i| |t_i|) - c_i s_i / |s_i|^2)     0 where either map is all zeros

A map smaller than the other one is interpolated bilinearly (align_corners=False), and the gradient is the transposed
interpolation of the above. Both are linear and separable: with R_v and R_h the interpolation along the axes, a small
map s stands for R_v s R_h^T, whose product with the large map t is <s, R_v^T t R_h> and whose square is <s, G_v s G_h>,
where G = R^T R has three diagonals. No pixel of an interpolated map has to be computed:

    dL/ds_i = -g_i f_i (R_v^T t_i R_h / (|s_i| |t_i|) - c_i G_v s_i G_h / |s_i|^2)

Source: Parchami-Araghi et al. 2024, "Good Teachers Explain: Explanation-Enhanced Knowledge Distillation" (e²KD, ECCV
2024, arXiv 2402.03119).

Bytes that must move: student and teacher read, the student's gradient written. As in debiaskd/ops/feature_match.py, the
forward pass writes the gradient for an upstream gradient of 1, and backward scales it in place where another arrives;
float16 and compiled graphs compute it in backward instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.ops.backend import REDUCTION_NAMES, REDUCTIONS, choose, kernels, register_fake
from debiaskd.ops.once import differentiable_once, is_one, unrecorded
from debiaskd.ops.reduction import by_weight
from debiaskd.utils import checks


def map_cosine_loss(
    student: Tensor, teacher: Tensor, weight: Tensor | None = None, *, reduction: str = "mean"
) -> Tensor:
    """Compute 1 minus the cosine between the student's and the teacher's attribution maps (e²KD).

    Maps of different sizes meet at the larger one, along each axis, by bilinear interpolation (align_corners=False). A
    map of zeros has cosine 0 and gradient 0, and so has one whose sum of squares is below the smallest normal number.

    Args:
        student: [N,H,W], or [N,C,H,W] for maps of several channels that make up one vector, such as the dynamic weights
            of a B-cos network at its input; gets the gradient. Any floating dtype. Maps that are not contiguous are
            copied first; a student that is smaller along one axis and larger along the other is interpolated first.
        teacher: as student; H and W may differ. A constant.
        weight: [N] >= 0, how much each sample counts; a constant.
        reduction: "mean" (divided by the sum of weights), "sum" or "none".

    Returns:
        Scalar, or [N] for "none". float32 for half precisions, else the student's dtype. N = 0 gives 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> student = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]])
        >>> map_cosine_loss(student, torch.ones(2, 1, 4), reduction="none")
        tensor([0., 1.])

    Source: Parchami-Araghi et al. 2024, arXiv 2402.03119 (e²KD).
    """
    teacher = _check(student, teacher, weight, reduction)
    if student.numel() == 0:
        return eager(student, teacher, weight, reduction)
    backend = choose("map_cosine", student)
    if backend == "eager":
        return eager(student, teacher, weight, reduction)
    student, teacher = _dense(student, teacher)
    loss: Tensor
    if student.requires_grad and torch.is_grad_enabled():
        loss = _MapCosine.apply(backend, student, teacher, weight, REDUCTIONS[reduction])
    else:
        loss, _ = kernels(backend).map_cosine(student, teacher, weight, REDUCTIONS[reduction], False)
    return loss


def eager(student: Tensor, teacher: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """The oracle: the formula as it stands, in PyTorch."""
    wide = torch.promote_types(student.dtype, torch.float32)
    size = _meeting(student, teacher)
    student, teacher = (_resized(x.to(wide), size).flatten(1) for x in (student, teacher))
    product, own, other = (student * teacher).sum(1), student.square().sum(1), teacher.square().sum(1)
    tiny = torch.finfo(wide).tiny
    zeros = (own < tiny) | (other < tiny)
    norms = torch.where(zeros, 1, own).sqrt() * torch.where(zeros, 1, other).sqrt()
    return by_weight(1 - torch.where(zeros, 0 * product, product / norms), weight, reduction)  # of NaN, NaN


def _meeting(student: Tensor, teacher: Tensor) -> tuple[int, int]:
    """The size at which both maps are compared."""
    return max(student.shape[-2], teacher.shape[-2]), max(student.shape[-1], teacher.shape[-1])


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    if len(maps) == 0:
        return maps.reshape(0, 1, *size)  # nothing, which interpolate refuses
    return F.interpolate(maps if maps.dim() == 4 else maps[:, None], size=size, mode="bilinear", align_corners=False)


def _dense(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both [N,C,H,W] and contiguous, one of them the larger along both axes."""
    size, own, other = _meeting(student, teacher), student.shape[-2:], teacher.shape[-2:]
    if size not in (tuple(own), tuple(other)):
        wide = torch.promote_types(student.dtype, torch.float32)
        student, teacher = _resized(student.to(wide), size), teacher.to(wide)
    if teacher.dim() == 3:
        teacher = teacher[:, None]
    if student.dim() == 3:
        student = student[:, None]
    return student.contiguous(), teacher.contiguous()


class _MapCosine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, student: Tensor, teacher: Tensor, weight: Tensor | None, reduction: int
    ) -> Tensor:
        # Whether to write the gradient now.
        ahead = student.dtype != torch.float16 and not torch.compiler.is_compiling()
        loss, gradient = kernels(backend).map_cosine(student, teacher, weight, reduction, ahead)
        ctx.save_for_backward(student, teacher, weight)
        ctx.gradient = gradient if ahead else None
        ctx.backend, ctx.reduction = backend, reduction
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None, None]:
        student, teacher, weight = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        with unrecorded():
            if gradient is None:
                gradient = kernels(ctx.backend).map_cosine_backward(
                    grad_output, student, teacher, weight, ctx.reduction
                )
            elif not is_one(grad_output):
                kernels(ctx.backend).feature_match_scale_(gradient, grad_output)
        return None, differentiable_once(gradient, "map_cosine_loss"), None, None, None


@register_fake("map_cosine")
def _(
    student: Tensor, teacher: Tensor, weight: Tensor | None, reduction: int, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    shape = student.shape[:1] if reduction == REDUCTIONS["none"] else ()
    loss = student.new_empty(shape, dtype=torch.promote_types(student.dtype, torch.float32))
    return loss, torch.empty_like(student) if with_gradient else student.new_empty(0)


@register_fake("map_cosine_backward")
def _(grad_output: Tensor, student: Tensor, teacher: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
    return torch.empty_like(student)


def _check(student: Tensor, teacher: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    checks.floating("student", student)
    checks.floating("teacher", teacher)
    if student.dim() not in (3, 4):
        raise ValueError(f"student must have shape [N,H,W] or [N,C,H,W], got {list(student.shape)}")
    dimensions = "[N,H,W]" if student.dim() == 3 else "[N,C,H,W]"
    if teacher.dim() != student.dim():
        raise ValueError(f"teacher must have shape {dimensions} as student has, got {list(teacher.shape)}")
    if teacher.shape[:-2] != student.shape[:-2]:
        expected = f"of N={len(student)}" + ("" if student.dim() == 3 else f", C={student.shape[1]}")
        raise ValueError(f"teacher must have shape {dimensions} {expected} as student has, got {list(teacher.shape)}")
    for name, maps in (("student", student), ("teacher", teacher)):
        if len(maps) and maps.numel() == 0:
            raise ValueError(f"{name} must have at least one pixel a map, got {list(maps.shape)}")
    checks.same_device("teacher", teacher, "student", student)
    checks.constant("teacher", teacher)
    if teacher.dtype != student.dtype:
        # Under autocast a frozen float32 teacher beside a half-precision student is the ordinary case.
        if not torch.is_autocast_enabled(student.device.type):
            checks.same_dtype("teacher", teacher, "student", student)
        teacher = teacher.to(student.dtype)
    if weight is not None:
        checks.sample_weight(weight, "student", student)
    checks.option("reduction", reduction, REDUCTION_NAMES)
    return teacher
