"""Hold batch normalization statistics constant in attributions.

In training mode batch norm computes its mean and variance from the whole batch, so the gradient of one image's logit
reaches every other image. An attribution is the gradient of the image's own logit with the statistics held constant:

    y = γ (x - μ) / σ + β        attribution's gradient: ∂y/∂x = γ / σ        every other gradient: through μ and σ, too

One forward pass serves both. Within `constant_statistics` batch norm records which of its two gradients to give: the
first where `attribution_gradient` asks, the second in every other backward pass. The attribution itself stays a
function of the weights in all ways: `γ / σ` is differentiated through σ, so a loss on the attribution gets the exact
gradient of its value.

Which statistics are held: those of every call of `torch.nn.functional.batch_norm` in training, of SyncBatchNorm, and
every mean, variance or standard deviation over the images and all other dimensions but at most one, as B-cos's norms,
EvoNorm-B and norms written by hand compute them.

The context also makes first derivatives differentiable that PyTorch leaves without a derivative (hard sigmoid).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from debiaskd.models.caches import without_caches
from debiaskd.models.constant_gradient import Constant, add_statistics, attributing, over_channels
from debiaskd.models.second_order import NormalizedConvolution
from debiaskd.models.second_order_calls import CALLS
from debiaskd.models.sync_batch_norm import synchronised


class Statistics:
    """The batch statistics of one forward pass, in the order in which it computed them."""

    def __init__(self) -> None:
        self.values: list[tuple[Tensor, ...]] = []

    def replay(self, *, detach: bool) -> Iterator[tuple[Tensor, ...]]:
        for values in self.values:
            yield tuple(value.detach() for value in values) if detach else values


@contextmanager
def constant_statistics(
    model: nn.Module,
    *,
    record: Statistics | None = None,
    replay: Iterator[tuple[Tensor, ...]] | None = None,
    explained: Sequence[Tensor] | None = None,
) -> Iterator[None]:
    """Context in which attributions of the model's output hold its batch statistics constant.

    Outputs, running statistics and all other gradients are unchanged. Attention uses PyTorch's plain kernel, the only
    one that can be differentiated twice, and cached attention biases are recomputed.

    Args:
        model: the module that runs in the context.
        record: receives the statistics.
        replay: statistics of an earlier pass, used instead of those of this batch.
        explained: a list that will contain the only feature map at which attributions are computed. A convolution and
            the norm after it are then one layer, and a map that is a leaf of the graph gets a gradient in attributions
            only.

    Example:
        >>> import torch
        >>> from debiaskd.attribution import input_x_gradient
        >>> from debiaskd.models.batch_statistics import constant_statistics
        >>> from debiaskd.models import SmallNet
        >>> model, images = SmallNet((4, 8), (2, 2), num_classes=3).train(), torch.randn(2, 3, 16, 16).requires_grad_()
        >>> with constant_statistics(model):
        ...     logits = model(images)
        >>> input_x_gradient(logits, images, torch.tensor([0, 2])).shape
        torch.Size([2, 16, 16])
    """
    with ExitStack() as stack:
        stack.enter_context(without_caches(model))
        stack.enter_context(synchronised(model))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_Mode(record, replay, explained))
        yield


class _Mode(TorchFunctionMode):
    def __init__(
        self,
        record: Statistics | None,
        replay: Iterator[tuple[Tensor, ...]] | None,
        explained: Sequence[Tensor] | None,
    ) -> None:
        super().__init__()
        self.record, self.replay, self.explained = record, replay, explained
        #: The last convolution's output, and what it was computed from.
        self.convolved: tuple[weakref.ref[Tensor], tuple[Any, ...]] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        return handler(self, func, *args, **kwargs)

    def constant(self, *computed: Tensor) -> tuple[Tensor, ...]:
        """These statistics, or those to be used instead, as constants of attributions."""
        if self.replay is not None:
            return self.replayed(computed)
        held = tuple(Constant.apply(each) if each.requires_grad else each for each in computed)
        if self.record is not None:
            self.record.values.append(held)
        return held

    def replayed(self, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
        assert self.replay is not None
        found = next(self.replay, None)
        if found is None or [value.shape for value in found] != [value.shape for value in like]:
            raise ValueError(
                "model must normalize in the same way each time that it runs on a batch, and it does not: "
                'integrated gradients of it need statistics="own"'
            )
        return found

    def convolution(self, output: Tensor) -> tuple[Any, ...] | None:
        """What `output` was computed from, if the last convolution gave it and nobody asks for its gradient."""
        if self.explained is None or self.convolved is None or self.convolved[0]() is not output:
            return None
        asked = output._backward_hooks or output.retains_grad or any(output is each for each in self.explained)
        return None if asked else self.convolved[1]


class _BatchNorm(torch.autograd.Function):
    """Batch norm by the batch's statistics: (y, mean, 1/σ), all of them differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, inverse = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return y, mean, inverse

    @staticmethod
    def backward(
        ctx: Any, for_y: Tensor | None, for_mean: Tensor | None, for_inverse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        if attributing():
            if for_y is None:
                return (None,) * 7
            scale = inverse if weight is None else inverse * weight
            return ((for_y * over_channels(scale, for_y)).to(for_y.dtype), *(None,) * 6)
        for_x = for_weight = for_bias = None
        if for_y is not None:
            wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
            for_x, for_weight, for_bias = torch.ops.aten.native_batch_norm_backward(
                for_y, x, weight, None, None, mean.detach(), inverse.detach(), True, ctx.eps, wanted
            )
        if ctx.needs_input_grad[0] and (for_mean is not None or for_inverse is not None):
            for_x = add_statistics(for_x, x, mean, inverse, for_mean, for_inverse)
        return for_x, for_weight, for_bias, None, None, None, None


def _batch_norm(
    mode: _Mode,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    grads = any(t is not None and t.requires_grad for t in (input, weight, bias))
    if not training or not grads or not input.numel() or input.numel() == input.shape[1]:  # the last is PyTorch's error
        return func(  # type: ignore[no-any-return]
            input, running_mean, running_var, weight, bias, training=training, momentum=momentum, eps=eps
        )
    if mode.replay is not None:
        with torch.no_grad():
            like = input.new_empty(input.shape[1])
        mean, inverse = mode.replayed((like, like))
        scale = inverse if weight is None else inverse * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        return (input * over_channels(scale, input) + over_channels(shift, input)).to(input.dtype)
    y: Tensor
    convolution = mode.convolution(input)
    if convolution is not None and all(t is None or t.dtype == input.dtype for t in (weight, bias)):
        x, w, offset, shape, source = convolution
        running = (running_mean, running_var)
        y, mean, inverse = NormalizedConvolution.apply(
            x, w, offset, weight, bias, input.detach(), running, momentum, eps, shape, source
        )
    else:
        y, mean, inverse = _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps)
    if mode.record is not None:
        mode.record.values.append((mean, inverse))
    return y


def _torch_batch_norm(
    mode: _Mode,
    func: Any,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _batch_norm(mode, F.batch_norm, input, running_mean, running_var, weight, bias, training, momentum, eps)


def _statistic(mode: _Mode, func: Any, *args: Any, **kwargs: Any) -> Any:
    """A reduction: of the whole batch, down to at most one other dimension, it is a statistic."""
    found = func(*args, **kwargs)
    x = args[0] if args else kwargs.get("input", kwargs.get("self"))
    dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
    if not isinstance(x, Tensor) or x.dim() < 2 or not x.requires_grad:
        return found
    if dim is None or isinstance(dim, bool):
        reduced = set(range(x.dim()))
    else:
        reduced = {each % x.dim() for each in ((dim,) if isinstance(dim, int) else tuple(dim))} or set(range(x.dim()))
    if 0 not in reduced or len(reduced) < x.dim() - 1:
        return found
    if isinstance(found, Tensor):
        return mode.constant(found)[0]
    return mode.constant(*found)


class _HardSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.hardsigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        inside: Tensor = (x > -3) & (x < 3)
        return gradient * inside / 6


def _hardsigmoid(mode: _Mode, func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    return _HardSigmoid.apply(input)  # type: ignore[no-any-return]


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.hardsigmoid: _hardsigmoid,
    **CALLS,
    **{
        function: _statistic
        for name in ("mean", "var", "std", "var_mean", "std_mean")
        for function in (getattr(torch, name, None), getattr(Tensor, name, None))
        if function is not None
    },
}


# ---- modules that need more than their functions replaced ----
