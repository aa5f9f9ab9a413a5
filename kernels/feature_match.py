"""Weighted feature matching with Triton: loss and gradient in one pass over student and teacher.

The formula is that of debiaskd/ops/feature_match.py. With f_i the factor of sample i's squared distance in the loss,

    _match    f_i = w_i / (divisor * total * norm_i);  g_ij = 2 u_i f_i (s_ij - t_ij);  f_i * sum_j (s_ij - t_ij)^2
    _norms    norm_i = sum_j t_ij^2, where a sample is too long for one program to hold
    _scale    g_ij *= u_i, in place
    add_up    the loss from what programs leave, and total = sum_i w_i of many samples

where `divisor` is what the host knows of it (M, and N of an unweighted mean), `total` is the sum of weights in a
weighted mean, `norm` is there with normalize, and u is the upstream gradient. What is not there is 1.

Bytes: the student and the teacher are read once and the gradient is written once, 3 passes, and that is the floor. With
normalize a sample of up to WHOLE elements stays in registers while its norm is summed; a longer teacher is read once
more, 4 passes. Besides, each program leaves one number, and reads at most MOST_PARTS weights, where there is a mean of
weighted samples.

Launches: forward 2, or 1 where one program does it all; 1 more for the norms of long samples, and 1 more for the sum of
more than MOST_PARTS weights. Backward the same without the loss: 1 in the ordinary case. Scaling: 1, which reads the
upstream gradient where it lies and moves nothing where it is 1.

Tensors are dense, and student and teacher in the same order: debiaskd/ops/feature_match.py copies others first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .layout import (
    Values,
    elements_of,
    inside,
    lay_out,
    pointers,
    samples_of,
    values_of,
)
from .precision import accumulator, add, divide, narrow, widen
from .sums import MEAN, NONE, add_up, few, total


@triton.jit
def _relative(factor, norm):
    """A teacher of zeros has no scale to be relative to: its sample counts 0."""
    return tl.where(norm > 0, divide(factor, norm), 0)


@triton.jit
def _factors(samples, shape, rows, part, weight, weights, count, norms, divisor, dtype: tl.constexpr):
    """What a sample's squared distance counts in the loss, as far as it is known before the sample is read."""
    scale = tl.full([], divisor, dtype)
    if weights is not None:
        scale *= total(weights.data, weights.stride, count, dtype)
    # Where nothing has weight the mean is 0.
    factors = tl.where(scale > 0, divide(values_of(weight, samples, rows, dtype), scale), 0)
    if norms is not None:
        own = norms + (tl.program_id(0) - part).to(tl.int64)  # the programs of a sample are neighbours
        factors = _relative(factors, total(own, 1, shape.parts, dtype))
    return factors


@triton.jit(do_not_specialize=("count", "divisor", "samples"))
def _match(
    student,
    teacher,
    gradient,  # None where nobody asked for it, and so with the loss
    loss,
    upstream,
    weight,
    weights,  # `count` of those to divide by the sum of, or sums of them
    count,
    norms,  # of long samples
    divisor,
    samples,
    shape,
    RELATIVE: tl.constexpr,
    EACH: tl.constexpr,
    INDEX: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if student.dtype.element_ty == tl.float64 else tl.float32
    rows, part = samples_of(shape, ROWS)
    known = _factors(samples, shape, rows, part, weight, weights, count, norms, divisor, dtype)
    result = tl.zeros([ROWS], dtype)
    lost = tl.zeros([ROWS], dtype)
    for step in range(shape.steps):
        cols = elements_of(shape, part, step, INDEX, COLS)
        mask = inside(samples, shape, rows, cols, VECTOR)
        s = widen(tl.load(pointers(student, shape, rows, cols, VECTOR), mask=mask, other=0), dtype)
        t = widen(tl.load(pointers(teacher, shape, rows, cols, VECTOR), mask=mask, other=0), dtype)
        difference = s - t
        factor = known
        if RELATIVE and norms is None:
            factor = _relative(known, tl.sum(t * t, 1))
        if loss is not None:
            result, lost = add(result, lost, factor * tl.sum(difference * difference, 1))
        if gradient is not None:
            element = (2 * factor)[:, None] * difference
            if upstream is not None:
                # Last, so that a backward pass through a retained graph rounds as _scale after the forward pass did.
                element *= values_of(upstream, samples, rows, dtype)[:, None]
            place = pointers(gradient, shape, rows, cols, VECTOR)
            tl.store(place, narrow(element, gradient.dtype.element_ty), mask=mask)
    if loss is not None:
        if EACH:
            tl.store(loss + (rows * shape.parts + part), result, mask=rows < samples)
        else:
            tl.store(loss + tl.program_id(0).to(tl.int64), tl.sum(result, 0))


@triton.jit(do_not_specialize=("samples",))
def _norms(
    teacher,
    norms,
    samples,
    shape,
    INDEX: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    dtype: tl.constexpr = norms.dtype.element_ty
    rows, part = samples_of(shape, ROWS)
    result = tl.zeros([ROWS], dtype)
    lost = tl.zeros([ROWS], dtype)
    for step in range(shape.steps):
        cols = elements_of(shape, part, step, INDEX, COLS)
        mask = inside(samples, shape, rows, cols, VECTOR)
        t = widen(tl.load(pointers(teacher, shape, rows, cols, VECTOR), mask=mask, other=0), dtype)
        result, lost = add(result, lost, tl.sum(t * t, 1))
    tl.store(norms + (rows * shape.parts + part), result, mask=rows < samples)


@triton.jit(do_not_specialize=("samples",))
def _scale(
    gradient,
    upstream,
    samples,
    shape,
    INDEX: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if gradient.dtype.element_ty == tl.float64 else tl.float32
    rows, part = samples_of(shape, ROWS)
    scale = values_of(upstream, samples, rows, dtype)
    changes = (scale != 1) & (rows < samples)
    steps = shape.steps * tl.max(changes.to(tl.int32), 0)
    for step in range(steps):
        cols = elements_of(shape, part, step, INDEX, COLS)
        mask = inside(samples, shape, rows, cols, VECTOR) & changes[:, None]
        place = pointers(gradient, shape, rows, cols, VECTOR)
        element = scale[:, None] * widen(tl.load(place, mask=mask, other=0), dtype)
        tl.store(place, narrow(element, gradient.dtype.element_ty), mask=mask)


# ---- the functions of csrc/schema.cpp ----


def feature_match(
    student: Tensor, teacher: Tensor, weight: Tensor | None, normalize: bool, reduction: int, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(student) if with_gradient else student.new_empty(0)
    loss = student.new_empty(student.shape[:1] if reduction == NONE else (), dtype=accumulator(student.dtype))
    if student.numel() == 0:
        return loss.zero_(), gradient
    _run(student, teacher, weight, normalize, reduction, gradient if with_gradient else None, loss, None)
    return loss, gradient


def feature_match_backward(
    grad_output: Tensor, student: Tensor, teacher: Tensor, weight: Tensor | None, normalize: bool, reduction: int
) -> Tensor:
    gradient = torch.empty_like(student)
    if student.numel():
        _run(student, teacher, weight, normalize, reduction, gradient, None, grad_output)
    return gradient


def feature_match_scale_(gradient: Tensor, grad_output: Tensor) -> None:
    if gradient.numel() == 0:
        return
    layout = lay_out(gradient, merged=grad_output.dim() == 0)
    upstream = Values.of(grad_output)
    arguments = (gradient, upstream, layout.samples, layout.shape)
    launch(_scale, layout.programs, gradient, *arguments, **layout.options(gradient.itemsize))


def _run(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    normalize: bool,
    reduction: int,
    gradient: Tensor | None,
    loss: Tensor | None,
    grad_output: Tensor | None,
) -> None:
    """The loss where there is one to fill, and the gradient, for an upstream gradient of 1 where none is given."""
    each = reduction == NONE
    layout = lay_out(student, merged=weight is None and not normalize and not each)
    options = layout.options(student.itemsize)
    samples, mean = student.shape[0], reduction == MEAN
    divisor = (1 if normalize else student.numel() // samples) * (samples if mean and weight is None else 1)
    norms = None
    if normalize and layout.elements > layout.cols:
        norms = student.new_empty(layout.programs, dtype=accumulator(student.dtype))
        launch(_norms, layout.programs, student, teacher, norms, layout.samples, layout.shape, **options)
    partial = loss
    if loss is not None and (layout.parts if each else layout.programs) > 1:
        partial = loss.new_empty(layout.programs)
    weights = few(weight, student.dtype) if mean and weight is not None else None
    arguments = (
        student,
        teacher,
        gradient,
        partial,
        None if grad_output is None else Values.of(grad_output),
        None if weight is None else Values.of(weight),
        None if weights is None else Values.of(weights),
        0 if weights is None else weights.numel(),
        norms,
        divisor,
        layout.samples,
        layout.shape,
    )
    launch(_match, layout.programs, student, *arguments, RELATIVE=normalize, EACH=each, **options)
    if loss is not None and partial is not loss:
        add_up(partial, loss)
