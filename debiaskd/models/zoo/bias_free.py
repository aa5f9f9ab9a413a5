"""X-DNNs: networks without biases, whose input × gradient is exact (Hesse et al. 2021).

A network that is positively homogeneous, `f(αx) = α f(x)` for α > 0, equals its own linearization: `f(x) = ∇f(x)·x`.
Contributions of input × gradient then add up to the logit, and are those of integrated gradients from 0, at the cost
of one backward pass. Convolutions and linear layers without bias, ReLU, average and max pooling are homogeneous.
Batch norm becomes so when it neither centres nor shifts (Mohan et al. 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from debiaskd.models.cut import close
from debiaskd.models.modules import share
from debiaskd.utils import checks

_BIASED = (nn.Linear, nn.modules.conv._ConvNd)


class BiasFreeBatchNorm2d(nn.Module):
    """`γ x / √(E[x²] + eps)`, with E over the batch in training and a running mean of it in evaluation.

    Args:
        channels: C of inputs [N,C,H,W].
        eps, momentum: as in `torch.nn.BatchNorm2d`.
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.running_square: Tensor
        self.register_buffer("running_square", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            square = x.float().square().mean((0, 2, 3))
            with torch.no_grad():
                self.running_square.lerp_(square.to(self.running_square), self.momentum)
        else:
            square = self.running_square
        scale = self.weight * (square + self.eps).rsqrt()
        return x * scale.to(x.dtype)[:, None, None]

    @classmethod
    def like(cls, norm: nn.BatchNorm2d) -> BiasFreeBatchNorm2d:
        """The scales of a batch norm, and the squares that its statistics amount to."""
        made = cls(norm.num_features, norm.eps, 0.1 if norm.momentum is None else norm.momentum)
        with torch.no_grad():
            if norm.weight is not None:
                made.weight.copy_(norm.weight)
            if norm.running_mean is not None and norm.running_var is not None:
                made.running_square.copy_(norm.running_var + norm.running_mean.square())
        like = next((t for t in (*norm.parameters(), *norm.buffers()) if t.is_floating_point()), made.weight)
        return made.to(like.device, like.dtype).train(norm.training)


def bias_free(model: nn.Module, example: Tensor) -> nn.Module:
    """Remove a model's biases and make its batch norms scale only, in place; returns the model.

    Args:
        model: convolutions, linear layers, ReLU, pooling, batch norm; ResNets, say.
        example: [N,3,H,W] that it runs on, to see whether what results is positively homogeneous.

    Raises:
        TypeError: not a module, or not a tensor.
        ValueError: it is not: another norm, attention, or an activation such as GELU. The model is left as it was.

    Example:
        >>> import torch
        >>> from debiaskd.models.zoo.bias_free import bias_free
        >>> from debiaskd.models import SmallNet
        >>> net, images = SmallNet((4, 8), (2, 2), num_classes=3).eval(), torch.randn(2, 3, 8, 8)
        >>> net = bias_free(net, images)
        >>> torch.allclose(net(5 * images), 5 * net(images), rtol=1e-4, atol=1e-6)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    checks.floating("example", example)
    trial = share(model).eval()
    _strip(trial)
    with torch.no_grad():
        logits, doubled = trial(example), trial(2 * example)
    if not close(doubled, 2 * logits):
        kinds = sorted({type(module).__name__ for module in trial.modules() if next(module.children(), None) is None})
        raise ValueError(f"model must be positively homogeneous without its biases, got one made of {', '.join(kinds)}")
    _strip(model)
    return model


def _strip(model: nn.Module) -> None:
    for name, child in list(model.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            if type(child) is not nn.BatchNorm2d:
                raise ValueError(f"model must use torch.nn.BatchNorm2d itself, got {type(child).__name__} at {name!r}")
            setattr(model, name, BiasFreeBatchNorm2d.like(child))
        else:
            _strip(child)
    if isinstance(model, _BIASED) and model.bias is not None:
        model.register_parameter("bias", None)
