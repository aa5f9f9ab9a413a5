"""Differentiable attribution maps: which positions contribute to a class score.

For a layer with feature map `A` and the gradient `G = ∂logit_k/∂A` of class k's logit:

    input × gradient      Σ_c G·A            (Shrikumar et al. 2017; at the image itself: with the image as A)
    Grad-CAM              relu(Σ_c mean_hw(G) · A)                    (Selvaraju et al. 2017)
    B-cos                 Σ_c G·A with dynamic weights held constant  (Böhle et al. 2022)
    integrated gradients  Σ_c (A - A₀) · mean over a path from A₀ to A of G   (Sundararajan et al. 2017)

Behind global average pooling and a linear head, `G = W_k / (H·W)` at every position of the last feature map. Input ×
gradient there is `Σ_c W_kc A_c / (H·W)`, without a backward pass; Grad-CAM is its positive part: the closed form.

Each image's map is of its own logit, with the batch's normalization statistics held constant. Where batch norm is in
training mode, run the model within `debiaskd.models.batch_statistics.constant_statistics(model)`, as `dk.Guide` does:
outside of it PyTorch's batch norm mixes all other images' logits into an image's map.

All functions are batched, with one or several classes per image, and run on the tensors' device. `create_graph=True`
keeps the graph that training through a map needs, as in `torch.autograd.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from debiaskd.attribution.gradients import check_target, scaled_gradients
from debiaskd.ops.channel_dot import channel_dot
from debiaskd.utils import checks


def input_x_gradient(logits: Tensor, feature: Tensor, target: Tensor, *, create_graph: bool = False) -> Tensor:
    """Compute input × gradient of a class score at a feature map, `Σ_c (∂logit_k/∂A)_c A_c`.

    Args:
        logits: [N,K], computed from `feature`.
        feature: [N,C,H,W], a layer's output or the images themselves; it must be part of the graph of `logits`.
        target: int64 [N] or [N,T]: the class to explain, or T of them, in [0,K).
        create_graph: keep the graph of the map itself, to train through it.

    Returns:
        [N,H,W], or [N,T,H,W].

    Raises:
        TypeError, ValueError: arguments that do not fit, or logits that do not depend on the feature.

    Example:
        >>> import torch
        >>> from debiaskd.attribution import input_x_gradient
        >>> feature = torch.tensor([[[[1.0, 2.0]]]], requires_grad=True)
        >>> logits = torch.stack([feature.sum((1, 2, 3)), feature.square().sum((1, 2, 3))], 1)
        >>> input_x_gradient(logits, feature, torch.tensor([1])).tolist()
        [[[2.0, 8.0]]]
    """
    return _for_each_class(lambda gradient: channel_dot(gradient, feature), logits, feature, target, create_graph)


def grad_cam(logits: Tensor, feature: Tensor, target: Tensor, *, create_graph: bool = False) -> Tensor:
    """Compute Grad-CAM, `relu(Σ_c mean_hw(∂logit_k/∂A)_c A_c)`; arguments and errors as `input_x_gradient`.

    Example:
        >>> import torch
        >>> from debiaskd.attribution import grad_cam
        >>> feature = torch.tensor([[[[1.0, -2.0]]]], requires_grad=True)
        >>> grad_cam(3 * feature.sum((2, 3)), feature, torch.tensor([0])).tolist()
        [[[3.0, 0.0]]]
    """
    return _for_each_class(
        lambda gradient: channel_dot(gradient.mean((2, 3)), feature).relu(), logits, feature, target, create_graph
    )


def integrated_gradients(
    head: Callable[[Tensor], Tensor],
    feature: Tensor,
    target: Tensor,
    *,
    baseline: Tensor | float = 0.0,
    steps: int = 32,
    create_graph: bool = False,
    alone: bool = False,
) -> Tensor:
    """Compute integrated gradients along the straight path from a baseline, by the midpoint rule.

    Summed over positions, a map approaches logit_k(feature) - logit_k(baseline) as `steps` grow.

    Args:
        head: from features [N,C,H,W] to logits [N,K]; for the images themselves, the model.
        feature: [N,C,H,W].
        target: int64 [N] or [N,T], classes in [0,K).
        baseline: start of the paths: a number, or a tensor that broadcasts to `feature`.
        steps: points on the path, ≥ 1; `head` runs once for each.
        create_graph: keep the graph of the map itself, to train through it.
        alone: differentiate through the batch's statistics, with one backward pass per image, instead of holding them
            constant.

    Returns:
        [N,H,W], or [N,T,H,W].

    Raises:
        TypeError, ValueError: arguments that do not fit, or logits that do not depend on the feature.

    Example:
        >>> import torch
        >>> from debiaskd.attribution import integrated_gradients
        >>> feature = torch.tensor([[[[1.0, 2.0]]]])
        >>> integrated_gradients(lambda a: a.square().sum((2, 3)), feature, torch.tensor([0]), steps=4).tolist()
        [[[1.0, 4.0]]]
    """
    checks.rank("feature", checks.floating("feature", feature), "[N,C,H,W]")
    if checks.integer("steps", steps) < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps}")
    whole = feature if feature.requires_grad else feature.detach().requires_grad_()
    if isinstance(baseline, Tensor):
        sizes = zip(reversed(baseline.shape), reversed(feature.shape))
        if baseline.dim() > feature.dim() or any(size not in (1, whole_size) for size, whole_size in sizes):
            raise ValueError(f"baseline must broadcast to feature, {list(feature.shape)}, got {list(baseline.shape)}")
    else:
        checks.number("baseline", baseline)
    difference = whole - baseline
    total: Tensor | None = None
    for step in range(steps):
        point = baseline + (step + 0.5) / steps * difference
        part = _for_each_class(
            lambda gradient: channel_dot(gradient, difference), head(point), point, target, create_graph, alone
        )
        total = part if total is None else total + part
    assert total is not None  # steps >= 1
    return (total if create_graph else total.detach()) / steps


def final_layer_map(feature: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Compute the attribution of a class at the last feature map in closed form.

    Valid if the logits are `W · mean_hw(A) + b`. Its sum over positions is the target's logit without bias.

    Args:
        feature: [N,C,H,W] map before global average pooling.
        weight: [K,C] of the linear head.
        target: int64 [N] or [N,T], the class to explain, or T of them, in [0,K).

    Returns:
        [N,H,W], or [N,T,H,W]: positive where evidence for the class lies, negative where evidence against it lies.

    Raises:
        TypeError: not floating tensors, or a target that is not int64.
        ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> from debiaskd.attribution import final_layer_map
        >>> feature, weight = torch.ones(1, 2, 2, 2), torch.tensor([[1.0, 3.0], [0.0, -4.0]])
        >>> final_layer_map(feature, weight, torch.tensor([0]))
        tensor([[[1., 1.],
                 [1., 1.]]])
    """
    checks.rank("feature", checks.floating("feature", feature), "[N,C,H,W]")
    checks.rank("weight", checks.floating("weight", weight), "[K,C]")
    checks.shape("weight", weight, "[K,C]", [weight.shape[0], feature.shape[1]])
    check_target(target, len(feature), len(weight))
    scaled = weight / (feature.shape[2] * feature.shape[3])
    if target.dim() == 1:
        return channel_dot(scaled[target], feature)
    return torch.stack([channel_dot(scaled[column], feature) for column in target.unbind(1)], 1)


@contextmanager
def explanation_mode(model: nn.Module) -> Iterator[None]:
    """Context in which the dynamic weights of B-cos layers are constants: gradients become linear maps.

    Applies to every module with `set_explanation_mode`, as in the `bcos` package. Outputs do not change.

    Raises:
        ValueError: the model has no such module.
    """
    layers = [module for module in model.modules() if callable(getattr(module, "set_explanation_mode", None))]
    if not layers:
        raise ValueError(
            f"model must hold B-cos layers (modules with set_explanation_mode), got {type(model).__name__} without any"
        )
    before = [bool(getattr(layer, "is_in_explanation_mode", False)) for layer in layers]
    for layer in layers:
        layer.set_explanation_mode(True)  # type: ignore[operator]
    try:
        yield
    finally:
        for layer, was in zip(layers, before):
            layer.set_explanation_mode(was)  # type: ignore[operator]


def draw_target(labels: Tensor, generator: torch.Generator | None = None, *, noise: Tensor | None = None) -> Tensor:
    """Draw one class per image uniformly from its positive labels.

    Args:
        labels: [N,K], bool or 0 and 1.
        generator: random generator on the device of `labels`; None: the global one.
        noise: [N,K] uniform in [0,1), used instead of random numbers.

    Returns:
        int64 [N]; -1 for an image without a positive label.

    Raises:
        TypeError, ValueError: not a tensor [N,K].

    Example:
        >>> import torch
        >>> from debiaskd.attribution import draw_target
        >>> draw_target(torch.tensor([[0, 1, 0], [0, 0, 0]]))
        tensor([ 1, -1])
    """
    checks.rank("labels", checks.tensor("labels", labels), "[N,K]")
    # The position of the largest of uniform numbers is uniform. One draw, without synchronisation.
    if noise is None:
        noise = torch.rand(labels.shape, generator=generator, device=labels.device)
    else:
        checks.shape("noise", checks.floating("noise", noise), "[N,K]", list(labels.shape))
    chance = noise + 1
    best = (chance * (labels > 0)).max(1)
    return torch.where(best.values > 0, best.indices, -1)


def _for_each_class(
    attribute: Callable[[Tensor], Tensor],
    logits: Tensor,
    feature: Tensor,
    target: Tensor,
    create_graph: bool,
    alone: bool = False,
) -> Tensor:
    """`attribute` of the gradient at the feature of each class asked for."""
    checks.rank("feature", checks.floating("feature", feature), "[N,C,H,W]")
    gradients, scale = scaled_gradients(logits, feature, target, create_graph=create_graph, alone=alone)
    with torch.set_grad_enabled(create_graph):
        maps = [attribute(gradient) / scale for gradient in gradients]  # none of them is more than proportional to it
    return maps[0] if target.dim() == 1 else torch.stack(maps, 1)
