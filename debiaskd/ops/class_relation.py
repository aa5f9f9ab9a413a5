"""Class relations: within each class, the student's samples are to lie to each other as the teacher's do.

Formula, for the classes k with n_k >= 2 samples in the batch, Q of them, and the cosines G_ij between samples i, j:

    loss = 1/Q sum_k 1/n_k^2 sum_(i,j in k) (Gs_ij - Gt_ij)^2          0 without such a class

Gradient, with the upstream gradient g, f = 4 g / (Q n_k^2) and D = Gs - Gt: each row is a combination of its class,

    dL/ds_i = sum_(j != i) f D_ij s_j / (|s_i| |s_j|)  -  s_i sum_(j != i) f D_ij Gs_ij / |s_i|^2

A row whose norm is below 1e-12 has no direction: its cosines, also with itself, are 0 and so is its gradient. (Nor has
`torch.nn.functional.normalize` any for it; but its gradient there would be 1e12 times what flows in.)

Source: Deng & Zhang 2021 (CID), the class loss.

Bytes that must move: student and teacher read, gradient written, 3 passes over small matrices. What must be computed:
sum n_k^2 / 2 products of rows a side, where a dense Gram matrix makes N^2 and masks most of them away. Samples are
sorted by class inside the op. The forward pass also writes the gradient for an upstream gradient of 1, in float32 at
least, while it knows the cosines, so that nothing has to outlive it whose size depends on the labels. Backward hands
that buffer on, multiplied in place where the upstream gradient is not 1; after the first time, through a retained
graph, it is recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from debiaskd.ops.backend import choose, kernels, register_fake
from debiaskd.ops.labels import check_labels
from debiaskd.ops.once import differentiable_once, is_one, unrecorded
from debiaskd.utils import checks


def class_relation_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Squared difference between the student's and the teacher's cosines among samples of one class.

    Args:
        student: [N,D] pooled features, unprojected; gets the gradient. Any floating dtype, any strides.
        teacher: [N,E] pooled features, of any width and any floating dtype; a constant.
        labels: int64 [N], >= 0: samples of one label are one class. Any number of classes.

    Returns:
        Scalar: the mean over classes with at least two samples of ‖G_t − G_s‖² / n². 0 without such a class. float32
        for half precisions, else the dtype of student.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 4.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> class_relation_loss(student, teacher, torch.tensor([0, 0, 1])).item()
        0.5

    Source: Deng & Zhang 2021 (CID).
    """
    _check(student, teacher, labels)
    backend = choose("class_relation", student)
    if backend == "eager":
        return eager(student, teacher, labels)
    loss: Tensor
    if student.requires_grad and torch.is_grad_enabled():
        loss = _ClassRelation.apply(backend, student, teacher, labels)
    else:
        loss, _ = kernels(backend).class_relation(student, teacher, labels, False)
    return loss


def eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The oracle: all cosines, those between classes masked away."""
    same = labels[:, None] == labels
    wide = torch.promote_types(student.dtype, torch.float32)
    size = same.sum(1).to(wide)
    weight = torch.where(size > 1, size.square().reciprocal(), 0)  # of a row, in its class's mean
    classes = (weight * size).sum().round().clamp(min=1)
    difference = torch.where(same, _cosines(student).to(wide) - _cosines(teacher).to(wide), 0)
    return (weight * difference.square().sum(1)).sum() / classes


def _cosines(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    square = x.square().sum(1, keepdim=True)
    directed = ~(square < 1e-24)  # NaN stays
    unit = torch.where(directed, x * torch.where(directed, square, 1).rsqrt(), 0)
    with torch.autocast(x.device.type, enabled=False):
        return unit @ unit.T


class _ClassRelation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        loss, gradient = kernels(backend).class_relation(student, teacher, labels, True)
        ctx.backend = backend
        ctx.dtype = student.dtype
        if torch.compiler.is_compiling():  # where no buffer can be handed on
            ctx.save_for_backward(gradient)
        else:
            ctx.save_for_backward(student, teacher, labels)
            ctx.gradient = gradient
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None]:
        with unrecorded():
            if torch.compiler.is_compiling():
                gradient = ctx.saved_tensors[0] * grad_output
            else:
                gradient, ctx.gradient = ctx.gradient, None
                if gradient is None:
                    _, gradient = kernels(ctx.backend).class_relation(*ctx.saved_tensors, True)
                if not is_one(grad_output):
                    ours = gradient if gradient.dtype == ctx.dtype else torch.empty_like(gradient, dtype=ctx.dtype)
                    gradient = torch.mul(gradient, grad_output, out=ours)
            gradient = gradient.to(ctx.dtype)
        return None, differentiable_once(gradient, "class_relation_loss"), None, None


@register_fake("class_relation")
def _(student: Tensor, teacher: Tensor, labels: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(student.dtype, torch.float32)
    rows = student.shape[0] if with_gradient else 0
    return student.new_empty((), dtype=wide), student.new_empty((rows, student.shape[1]), dtype=wide)


def _check(student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    checks.floating("student", student)
    checks.floating("teacher", teacher)
    checks.rank("student", student, "[N,D]")
    checks.rank("teacher", teacher, "[N,E]")
    checks.shape("teacher", teacher, "[N,E]", [student.shape[0], teacher.shape[1]])
    checks.same_device("teacher", teacher, "student", student)
    checks.constant("teacher", teacher)
    check_labels(labels, "student", student)
