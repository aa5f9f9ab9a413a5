"""Backdoor adjustment: class logits averaged over what images are shown with, P(y | do(x)) = sum_z P(y | x, z) P(z).

The strata z are the classes' contexts e_z, and how probable each is for a sample is p = softmax(logits / temperature),
or a prior given by the user. W = [W1 W2] is the head's weight, W1 [K,D] for the feature s and W2 [K,E] for a context.

    nwgm    W1 s + W2 sum_z p_z e_z + b                      the expectation moved inside of the head
    exact   log sum_z p_z softmax(W1 s + W2 e_z + b)

nwgm is three matrix products; of (p e) W2' and p (e W2') it takes the cheaper one. exact, with A = s W1' + b [N,K] and
B = e W2' [Z,K], is two log-matrix-products, and no [N,Z,K] anywhere:

    S_nz = log sum_k exp(A_nk + B_zk)        V_nz = log p_nz - S_nz
    T_nk = log sum_z exp(V_nz + B_zk)        output = A + T

Gradient of exact, with the upstream gradient g. A log-matrix-product's derivatives are softmaxes, which factorise: with
r_nzk = exp(A_nk + B_zk - S_nz) for S and q_nkz = exp(V_nz + B_zk - T_nk) for T,

    h_nz = sum_k g_nk q_nkz = e^V (g e^-T) e^B'                      (gradient of V; -h of S)
    dA_nk = g_nk - sum_z h_nz r_nzk = g - e^A (h e^-S) e^B
    dB_zk = sum_n g_nk q_nkz - sum_n h_nz r_nzk = e^B (e^V' (g e^-T) - (h e^-S)' e^A)

where products of [N,Z], [N,K] and [Z,K] are matrix products and all others go element by element: 2 matrix products of
N Z K forward and 4 backward. Each exponential is shifted by maxima, and where a shifted sum comes out too small for
its precision, that sum alone is taken term by term (csrc/common/log_range.h says when). From A and B, matrix products
lead to feature, weight and bias.

What must be done: 6 products of 2 N Z K flops; read A, B, log p and g, write the output and the gradients of A and B,
less than ten passes over [N,K], [N,Z] or [Z,K]. The naive form moves [N,Z,K] a dozen times.

Source: Deng & Zhang 2021, "Comprehensive Knowledge Distillation with Causal Intervention" (CID), NeurIPS.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from debiaskd.ops.backend import choose, kernels, register_fake
from debiaskd.ops.once import differentiable_once, unrecorded
from debiaskd.ops.split_linear import split_linear, without_autocast
from debiaskd.utils import checks

MODES = ("nwgm", "exact")
#: Elements of the largest tensor that the eager log-matrix-product makes.
TILE = 1 << 20


def backdoor_logits(
    feature: Tensor,
    logits: Tensor,
    context: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 4.0,
    mode: str = "nwgm",
    prior: Tensor | None = None,
) -> Tensor:
    """Class logits of a linear head that sees the feature and a context, adjusted for the context by intervention.

    Args:
        feature: [N,D] pooled features of the student; gets a gradient. Any floating dtype, any strides.
        logits: [N,K] the student's own, unadjusted; softmax(logits / temperature) says how probable each stratum is.
            They may require grad and get none from here: the weights of an average over strata are not to be trained
            towards a smaller loss.
        context: [K,E] one vector for each class (see `class_context`); a constant. Like logits and prior of any
            floating dtype; weight and bias have the feature's, except under autocast.
        weight: [K,D+E] the head's, feature first; gets a gradient.
        bias: [K]; gets a gradient.
        temperature: > 0.
        mode: "nwgm" (as published: the mean context enters the head) or "exact" (the mean of the probabilities).
        prior: [K] >= 0, the probability of each stratum, the same for every sample and instead of the softmax; a
            constant, for "exact" only. It is used as it is: one that sums to c shifts all results by log c.

    Returns:
        [N,K] logits; log-probabilities for "exact". Computed and returned in float32 for half precisions, under
        autocast too, else in the feature's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> feature, logits, context = torch.ones(1, 2), torch.zeros(1, 3), torch.eye(3, 4)
        >>> weight = torch.eye(3, 6, requires_grad=True)
        >>> adjusted = backdoor_logits(feature, logits, context, weight, mode="exact")
        >>> adjusted.exp().sum().item(), adjusted.argmax().item()
        (1.0, 0)

    Source: Deng & Zhang 2021 (CID).
    """
    _check(feature, logits, context, weight, bias, temperature, mode, prior)
    wide = torch.promote_types(torch.promote_types(feature.dtype, weight.dtype), torch.float32)
    feature, weight, context, logits = (_as(wide, x) for x in (feature, weight, context, logits.detach()))
    bias = None if bias is None else _as(wide, bias)
    with without_autocast(feature):
        scaled = logits / temperature
        if mode == "nwgm":
            return _nwgm(feature, scaled.softmax(1), context, weight, bias)
        log_prior = scaled.log_softmax(1) if prior is None else _as(wide, prior).log().expand_as(logits)
        feature_logits, context_logits = split_linear(feature, weight, bias, context, False)
        return _exact(feature_logits, context_logits, log_prior)


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a cast that changes nothing is still a call


def _nwgm(feature: Tensor, probability: Tensor, context: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    samples, strata = probability.shape
    classes, length = weight.shape[0], context.shape[1]
    # Flops of each association's products, backward included: d(weight) costs what the product with it cost.
    trained = int(weight.requires_grad and torch.is_grad_enabled())
    mean_first = samples * length * (strata + classes + trained * classes)
    head_first = strata * classes * ((1 + trained) * (length + samples))
    # An exported program serves every batch size, so that none may decide there.
    if torch.compiler.is_exporting() or mean_first <= head_first:
        output: Tensor = split_linear(feature, weight, bias, probability @ context, True)
        return output
    of_feature, of_context = split_linear(feature, weight, bias, context, False)
    return torch.addmm(of_feature, probability, of_context)


def _exact(feature_logits: Tensor, context_logits: Tensor, log_prior: Tensor) -> Tensor:
    """log sum_z exp(log_prior_nz) softmax_k(feature_logits_nk + context_logits_zk), [N,K]; Z need not be K."""
    output: Tensor
    backend = choose("backdoor", feature_logits)
    if backend == "eager":
        return eager(feature_logits, context_logits, log_prior)
    arguments = (feature_logits, context_logits, log_prior)
    if torch.is_grad_enabled() and (feature_logits.requires_grad or context_logits.requires_grad):
        output = _Backdoor.apply(backend, *arguments)
    else:
        output, _ = kernels(backend).backdoor(*arguments)
    return output


def eager(feature_logits: Tensor, context_logits: Tensor, log_prior: Tensor) -> Tensor:
    """The oracle: both log-matrix-products as streaming log-sum-exps, exact whatever the range."""
    # torch.func's transforms take no autograd.Function of this kind: there, the sums are held.
    log_matmul = _held if checks.transformed() else _LogMatmul.apply
    norm = log_matmul(feature_logits, context_logits)
    return feature_logits + log_matmul(log_prior - norm, context_logits.mT)


def _held(x: Tensor, y: Tensor) -> Tensor:
    """log sum_l exp(x_il + y_jl), all of them at once, [I,J,L]."""
    return _sums(x, y).logsumexp(2)


class _LogMatmul(torch.autograd.Function):
    """log sum_l exp(x_il + y_jl) of x [I,L] and y [J,L], in tiles that are forgotten at once and rebuilt backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        rows, columns = _tiles(x, y)
        output = torch.cat([torch.cat([_sums(x[r], y[c]).logsumexp(2) for c in columns], 1) for r in rows])
        ctx.save_for_backward(x, y, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        x, y, output = ctx.saved_tensors
        rows, columns = _tiles(x, y)
        grad_x: list[Any] = [0] * len(rows)
        grad_y: list[Any] = [0] * len(columns)
        for i, r in enumerate(rows):
            for j, c in enumerate(columns):
                share = grad_output[r, c, None] * (_sums(x[r], y[c]) - output[r, c, None]).exp()
                grad_x[i] = grad_x[i] + share.sum(1)
                grad_y[j] = grad_y[j] + share.sum(0)
        return torch.cat(grad_x), torch.cat(grad_y)


def _sums(x: Tensor, y: Tensor) -> Tensor:
    return x[:, None] + y


def _tiles(x: Tensor, y: Tensor) -> tuple[list[slice], list[slice]]:
    if torch.compiler.is_exporting():  # samples are not counted, and go together, as if they were 16
        return [slice(None)], list(_slices(y.shape[0], max(1, TILE // 16 // x.shape[1])))
    columns = max(1, TILE // x.shape[1])
    rows = max(1, TILE // (x.shape[1] * min(columns, y.shape[0])))
    return list(_slices(x.shape[0], rows)), list(_slices(y.shape[0], columns))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(i, i + step) for i in range(0, max(length, 1), step))


class _Backdoor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, feature_logits: Tensor, context_logits: Tensor, log_prior: Tensor) -> Tensor:
        output, norm = kernels(backend).backdoor(feature_logits, context_logits, log_prior)
        ctx.backend = backend
        ctx.save_for_backward(feature_logits, context_logits, log_prior, norm, output)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, Tensor | None, None]:
        of_context = ctx.needs_input_grad[2]
        with unrecorded():
            grad_feature, grad_context = kernels(ctx.backend).backdoor_backward(
                grad_output, *ctx.saved_tensors, of_context
            )
        grad_feature = differentiable_once(grad_feature, "backdoor_logits")
        return None, grad_feature, differentiable_once(grad_context, "backdoor_logits") if of_context else None, None


@register_fake("backdoor")
def _(feature_logits: Tensor, context_logits: Tensor, log_prior: Tensor) -> tuple[Tensor, Tensor]:
    samples, classes = feature_logits.shape
    return (
        feature_logits.new_empty((samples, classes)),
        feature_logits.new_empty((samples, context_logits.shape[0])),
    )


@register_fake("backdoor_backward")
def _(
    grad_output: Tensor,
    feature_logits: Tensor,
    context_logits: Tensor,
    log_prior: Tensor,
    norm: Tensor,
    output: Tensor,
    with_context: bool,
) -> tuple[Tensor, Tensor]:
    shape = context_logits.shape if with_context else (0,)
    return feature_logits.new_empty(feature_logits.shape), context_logits.new_empty(shape)


def _check(
    feature: Tensor,
    logits: Tensor,
    context: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    mode: str,
    prior: Tensor | None,
) -> None:
    checks.floating("feature", feature)
    checks.rank("feature", feature, "[N,D]")
    checks.floating("logits", logits)
    checks.rank("logits", logits, "[N,K]")
    samples, classes = feature.shape[0], logits.shape[1]
    checks.shape("logits", logits, "[N,K]", (samples, classes))
    if classes < 1:
        raise ValueError(f"logits must have at least one class, got {list(logits.shape)}")
    checks.floating("context", context)
    checks.rank("context", context, "[K,E]")
    checks.shape("context", context, "[K,E]", (classes, context.shape[1]))
    checks.constant("context", context)
    checks.floating("weight", weight)
    checks.shape("weight", weight, "[K,D+E]", (classes, feature.shape[1] + context.shape[1]))
    _same_as_feature("weight", weight, feature)
    if bias is not None:
        checks.floating("bias", bias)
        checks.shape("bias", bias, "[K]", (classes,))
        _same_as_feature("bias", bias, feature)
    for name, value in (("logits", logits), ("context", context)):
        checks.same_device(name, value, "feature", feature)
    checks.number("temperature", temperature, minimum=0, exclusive=True)
    checks.option("mode", mode, MODES)
    if prior is not None:
        _check_prior(prior, feature, classes, mode)


def _same_as_feature(name: str, value: Tensor, feature: Tensor) -> None:
    checks.same_device(name, value, "feature", feature)
    # Under autocast a float32 head beside a half-precision feature is the ordinary case.
    if not torch.is_autocast_enabled(feature.device.type):
        checks.same_dtype(name, value, "feature", feature)


def _check_prior(prior: Tensor, feature: Tensor, classes: int, mode: str) -> None:
    checks.floating("prior", prior)
    if mode != "exact":
        raise ValueError(f'prior must be None unless mode="exact", got one with mode={mode!r}')
    checks.shape("prior", prior, "[K]", (classes,))
    checks.same_device("prior", prior, "feature", feature)
    checks.constant("prior", prior)
    checks.finite_nonnegative("prior", prior)
    if checks.readable(prior) and not prior.any():
        raise ValueError("prior must be positive somewhere, got zeros only")
    checks.on_device(prior, prior.any, "prior must be positive somewhere")
