"""Knowledge distillation: the student's softened predictions pulled to the teacher's.

Formula, with p = softmax(u / T) of the teacher's logits u, q = softmax(l / T) of the student's l:

    loss = T^2 / N  sum_i sum_k p_ik (log p_ik - log q_ik)

Gradient, with the upstream gradient g:  dL/dl_ik = g T / N (q_ik - p_ik)

T^2 keeps the gradient's size when T changes.

Source: Hinton, Vinyals & Dean 2015, arXiv 1503.02531; as used by Deng & Zhang 2021 (CID).

A composition of PyTorch ops, the same under every backend, and without a kernel: logits are [N,K], next to nothing
beside a network's feature maps, so that even a loss for free would gain a fraction of a millisecond a step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd import checks


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T² times the Kullback-Leibler divergence of the student's softened predictions from the teacher's, batch mean.

    Args:
        student_logits: [N,K]; gets the gradient. Any floating dtype, any strides.
        teacher_logits: [N,K]; any floating dtype; a constant. A class at -inf has probability 0 and counts nothing.
        temperature: T > 0.

    Returns:
        Scalar. float32 for half precisions, else the dtype of student_logits. N = 0 gives 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> loss = kd_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, -4.0]]))
        >>> round(loss.item(), 3)
        5.245

    Source: Hinton, Vinyals & Dean 2015, arXiv 1503.02531.
    """
    temperature = _check(student_logits, teacher_logits, temperature)
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    student = (student_logits.to(wide) / temperature).log_softmax(1)
    teacher = (teacher_logits.to(wide) / temperature).softmax(1)
    return F.kl_div(student, teacher, reduction="sum") * (temperature**2 / max(student_logits.shape[0], 1))


def _check(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> float:
    checks.floating("student_logits", student_logits)
    checks.floating("teacher_logits", teacher_logits)
    checks.rank("student_logits", student_logits, "[N,K]")
    checks.shape("teacher_logits", teacher_logits, "that of student_logits", student_logits.shape)
    checks.same_device("teacher_logits", teacher_logits, "student_logits", student_logits)
    checks.constant("teacher_logits", teacher_logits)
    return checks.number("temperature", temperature, minimum=0.0, exclusive=True)
