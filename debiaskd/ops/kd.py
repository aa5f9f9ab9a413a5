"""Knowledge distillation: the student's softened predictions pulled to the teacher's.

Formula, with p = softmax(u / T) of the teacher's logits u, q = softmax(l / T) of the student's l:

    d_i  = T^2 sum_k p_ik (log p_ik - log q_ik)
    mean = sum_i w_i d_i / sum_i w_i          (w_i = 1 without weight; 0 where nothing has weight)
    sum  = sum_i w_i d_i
    none = [w_1 d_1, ..., w_N d_N]

Gradient, with the upstream gradient g:  dL/dl_ik = g_i f_i T (q_ik - p_ik), where f_i is the factor of d_i above:
1 / N for the mean without weight.

T^2 keeps the gradient's size when T changes.

Source: Hinton, Vinyals & Dean 2015, arXiv 1503.02531; as used by Deng & Zhang 2021 (CID).

A composition of PyTorch ops, the same under every backend, and without a kernel: logits are [N,K], next to nothing
beside a network's feature maps, so that even a loss for free would gain a fraction of a millisecond a step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.ops.backend import REDUCTION_NAMES
from debiaskd.ops.reduction import by_weight
from debiaskd.utils import checks


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weight: Tensor | None = None,
    *,
    temperature: float = 4.0,
    reduction: str = "mean",
) -> Tensor:
    """T² times the Kullback-Leibler divergence of the student's softened predictions from the teacher's.

    Args:
        student_logits: [N,K]; gets the gradient. Any floating dtype, any strides.
        teacher_logits: [N,K]; any floating dtype; a constant. A class at -inf has probability 0 and counts nothing.
        weight: [N] >= 0, how much each sample counts (see `error_weights`, `group_weights`); a constant.
        temperature: T > 0.
        reduction: "mean" (divided by the sum of weights), "sum" or "none".

    Returns:
        Scalar, or [N] for "none". float32 for half precisions, else the dtype of student_logits. N = 0 gives 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> loss = kd_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, -4.0]]))
        >>> round(loss.item(), 3)
        5.245

    Source: Hinton, Vinyals & Dean 2015, arXiv 1503.02531.
    """
    temperature = _check(student_logits, teacher_logits, weight, temperature, reduction)
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    student = (student_logits.to(wide) / temperature).log_softmax(1)
    teacher = (teacher_logits.to(wide) / temperature).softmax(1)
    each = F.kl_div(student, teacher, reduction="none").sum(1) * temperature**2
    return by_weight(each, weight, reduction)


def _check(
    student_logits: Tensor, teacher_logits: Tensor, weight: Tensor | None, temperature: float, reduction: str
) -> float:
    checks.floating("student_logits", student_logits)
    checks.floating("teacher_logits", teacher_logits)
    checks.rank("student_logits", student_logits, "[N,K]")
    checks.shape("teacher_logits", teacher_logits, "that of student_logits", student_logits.shape)
    checks.same_device("teacher_logits", teacher_logits, "student_logits", student_logits)
    checks.constant("teacher_logits", teacher_logits)
    if weight is not None:
        checks.sample_weight(weight, "student_logits", student_logits)
    checks.option("reduction", reduction, REDUCTION_NAMES)
    return checks.number("temperature", temperature, minimum=0.0, exclusive=True)
