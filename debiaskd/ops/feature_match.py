"""Weighted feature matching: the student's feature map pulled to the teacher's, sample by sample.

Formula, for samples i = 1..N of M elements each:

    d_i  = sum_j (s_ij - t_ij)^2 / M          or, with normalize, / sum_j t_ij^2
    mean = sum_i w_i d_i / sum_i w_i          (w_i = 1 without weight; 0 where nothing has weight)
    sum  = sum_i w_i d_i
    none = [w_1 d_1, ..., w_N d_N]

Gradient, with the upstream gradient g:  dL/ds_ij = g_i * 2 f_i (s_ij - t_ij), where f_i is the factor of the squared
distance above: w_i / (M sum w), say. A sample whose teacher is all zeros has no scale to be relative to and counts 0
under normalize.

Sources: Lee & Lee 2023 (DeTT, arXiv 2302.11187) for the weighted match; Deng & Zhang 2021 (CID) for `normalize`.

Bytes that must move: student and teacher read, gradient written: 3 passes over one map. Autograd as usual makes more,
since forward and backward each read both. Here the forward pass writes the gradient for an upstream gradient of 1,
and backward has nothing left to do when that is what arrives, or one pass in place over a buffer that is ours.
Two cases compute the gradient in backward instead, from student and teacher, at 5 passes: float16, whose range
would lose the unscaled gradient (a loss scaler multiplies it only later), and compiled graphs, where no buffer can be
handed over in place. So does every backward after the first through a retained graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from debiaskd.ops.backend import REDUCTION_NAMES, REDUCTIONS, choose, kernels, register_fake
from debiaskd.ops.once import differentiable_once, is_one, unrecorded
from debiaskd.ops.reduction import by_weight
from debiaskd.utils import checks


def feature_match_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None = None,
    *,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Weighted squared distance between the student's and the teacher's feature maps.

    Args:
        student: [N, ...] feature maps or vectors; gets the gradient. Any floating dtype. Contiguous and channels_last
            tensors are read in place; tensors with other strides are copied first, and so is a teacher whose memory
            format is not the student's.
        teacher: as student, same shape and dtype; a constant.
        weight: [N] >= 0, how much each sample counts (see `error_weights`, `group_weights`); a constant.
        normalize: divide each sample by the teacher's squared norm instead of its number of elements.
        reduction: "mean" (divided by the sum of weights), "sum" or "none".

    Returns:
        Scalar, or [N] for "none". float32 for half precisions (a sum of squares would overflow them), else the
        student's dtype. N = 0 gives 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> student = torch.zeros(2, 3, 4, 4, requires_grad=True)
        >>> loss = feature_match_loss(student, torch.ones(2, 3, 4, 4), torch.tensor([1.0, 3.0]))
        >>> loss.backward(); loss.item(), round((student.grad[1] / student.grad[0]).mean().item(), 3)
        (1.0, 3.0)

    Source: Lee & Lee 2023, arXiv 2302.11187 (DeTT).
    """
    teacher = _check(student, teacher, weight, normalize, reduction)
    backend = choose("feature_match", student)
    if backend == "eager":
        return eager(student, teacher, weight, normalize, reduction)
    arguments = (student, teacher, weight, normalize, REDUCTIONS[reduction])
    loss: Tensor
    if student.requires_grad and torch.is_grad_enabled():
        loss = _FeatureMatch.apply(backend, *arguments)
    else:
        loss, _ = kernels(backend).feature_match(*_dense(student, teacher), *arguments[2:], False)
    return loss


def eager(student: Tensor, teacher: Tensor, weight: Tensor | None, normalize: bool, reduction: str) -> Tensor:
    """The oracle: the formula as it stands, in PyTorch."""
    wide = torch.promote_types(student.dtype, torch.float32)
    # The extra axis gives samples of a single number one, too.
    student, teacher = (x.to(wide)[..., None].flatten(1) for x in (student, teacher))
    distance = (student - teacher).square().sum(1)
    if normalize:
        scale = teacher.square().sum(1)
        distance = distance * torch.where(scale > 0, 1 / scale.clamp(min=torch.finfo(wide).tiny), 0)
    else:
        distance = distance / max(student.shape[1], 1)
    return by_weight(distance, weight, reduction)


def _dense(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both without gaps and in the same order, the student's where it is contiguous or channels_last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    order = formats.get(student.dim(), torch.contiguous_format)
    if student.is_contiguous() or not student.is_contiguous(memory_format=order):
        order = torch.contiguous_format
    return student.contiguous(memory_format=order), teacher.contiguous(memory_format=order)


class _FeatureMatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, student: Tensor, teacher: Tensor, weight: Tensor | None, normalize: bool, reduction: int
    ) -> Tensor:
        # Whether to write the gradient now.
        ahead = student.dtype != torch.float16 and not torch.compiler.is_compiling()
        student, teacher = _dense(student, teacher)
        loss, gradient = kernels(backend).feature_match(student, teacher, weight, normalize, reduction, ahead)
        ctx.save_for_backward(student, teacher, weight)
        ctx.gradient = gradient if ahead else None
        ctx.backend, ctx.normalize, ctx.reduction = backend, normalize, reduction
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None, None, None]:
        student, teacher, weight = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        with unrecorded():
            if gradient is None:
                gradient = kernels(ctx.backend).feature_match_backward(
                    grad_output, student, teacher, weight, ctx.normalize, ctx.reduction
                )
            elif not is_one(grad_output):
                kernels(ctx.backend).feature_match_scale_(gradient, grad_output)
        return None, differentiable_once(gradient, "feature_match_loss"), None, None, None, None


@register_fake("feature_match")
def _(
    student: Tensor, teacher: Tensor, weight: Tensor | None, normalize: bool, reduction: int, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    shape = student.shape[:1] if reduction == REDUCTIONS["none"] else ()
    loss = student.new_empty(shape, dtype=torch.promote_types(student.dtype, torch.float32))
    return loss, torch.empty_like(student) if with_gradient else student.new_empty(0)


@register_fake("feature_match_backward")
def _(
    grad_output: Tensor, student: Tensor, teacher: Tensor, weight: Tensor | None, normalize: bool, reduction: int
) -> Tensor:
    return torch.empty_like(student)


@register_fake("feature_match_scale_")
def _(gradient: Tensor, grad_output: Tensor) -> None:
    return None


def _check(student: Tensor, teacher: Tensor, weight: Tensor | None, normalize: bool, reduction: str) -> Tensor:
    checks.floating("student", student)
    checks.floating("teacher", teacher)
    if student.dim() < 1:
        raise ValueError(f"student must have shape [N, ...], got {list(student.shape)}")
    checks.shape("teacher", teacher, "that of student", student.shape)
    checks.same_device("teacher", teacher, "student", student)
    checks.constant("teacher", teacher)
    if teacher.dtype != student.dtype:
        # Under autocast a frozen float32 teacher beside a half-precision student is the ordinary case.
        if not torch.is_autocast_enabled(student.device.type):
            checks.same_dtype("teacher", teacher, "student", student)
        teacher = teacher.to(student.dtype)
    if weight is not None:
        checks.sample_weight(weight, "student", student)
    checks.flag("normalize", normalize)
    checks.option("reduction", reduction, REDUCTION_NAMES)
    return teacher
