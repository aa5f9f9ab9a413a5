"""Last layers refitted without annotation of the bias: AFR, SELF, EVaLS and the class-balanced baseline.

Each method chooses samples or weights (`afr_weights`, `disagreement`, `loss_extremes`, `class_weights`); one solver
fits the layer.

- AFR, Qiu et al. 2023 (arXiv 2306.11074): held-out images weighted by how unsure the plain model is of the true
  class.
- SELF, LaBonte et al. 2023 (arXiv 2309.08534): those on which an early-stopped model and the final one differ most.
- EVaLS, Ghaznavi et al. 2024 (arXiv 2410.05345): per class the highest and the lowest losses, alike.
- Class-balanced refitting: the baseline that all of them have to beat.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.bias.environments import check_labels, check_logits
from debiaskd.utils import checks


def class_weights(labels: Tensor) -> Tensor:
    """Weights float64 [N] that sum to 1 and let every class that occurs count alike.

    Example:
        >>> import torch
        >>> from debiaskd.bias import class_weights
        >>> class_weights(torch.tensor([0, 0, 0, 1]))
        tensor([0.1667, 0.1667, 0.1667, 0.5000], dtype=torch.float64)
    """
    check_labels(labels, len(labels), int(labels.max()) + 1 if len(labels) else 1)
    counts = torch.bincount(labels).to(torch.float64)
    return 1 / (counts[labels] * (counts > 0).sum())


def afr_weights(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """AFR's weights `w_i ∝ β_y exp(−γ p_i)`, with `p_i` the model's probability of the true class and `β_y = 1/n_y`.

    Args:
        logits: [N,K] of the plainly trained model on images that it was not trained on.
        labels: int64 [N] in [0,K).
        gamma: γ ≥ 0; 0 is the class-balanced baseline. Chosen on validation, as is the pull towards the old layer.

    Returns:
        float64 [N], which sum to 1.

    Example:
        >>> import torch
        >>> from debiaskd.bias import afr_weights
        >>> afr_weights(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 0]), gamma=4.0)
        tensor([0.0207, 0.9793], dtype=torch.float64)

    Source: Qiu et al. 2023, equation of the weights.
    """
    check_logits(logits, labels)
    gamma = checks.number("gamma", gamma, minimum=0)
    probability = logits.detach().double().softmax(1).gather(1, labels[:, None])[:, 0]
    weight = class_weights(labels) * torch.exp(-gamma * probability)
    return weight / weight.sum()


def disagreement(early: Tensor, final: Tensor, labels: Tensor, count: int, *, by: str = "kl") -> Tensor:
    """SELF's samples: those of each class on which an early model and the final one disagree most.

    Args:
        early: [N,K] logits of a model stopped early.
        final: [N,K] logits of the final model.
        labels: int64 [N] in [0,K).
        count: samples in all, divided evenly over the classes that occur; a class with fewer gives all that it has.
        by: "kl", the divergence of the final model's prediction from the early one's; "mistakes", the early model's
            loss.

    Returns:
        int64 indices, ascending.
    """
    check_logits(final, labels)
    checks.shape("early", checks.floating("early", early), "[N,K]", final.shape)
    checks.option("by", by, ("kl", "mistakes"))
    if checks.integer("count", count) < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    first, last = (x.detach().double().log_softmax(1) for x in (early, final))
    score = (last.exp() * (last - first)).sum(1) if by == "kl" else F.nll_loss(first, labels, reduction="none")
    return _highest_of_each_class(score, labels, count)


def loss_extremes(loss: Tensor, labels: Tensor, count: int) -> Tensor:
    """EVaLS's samples: of each class the `count` highest and the `count` lowest losses.

    A class of fewer than `2 · count` samples gives as many of either as half of it holds, so that both sides stay
    alike.

    Args:
        loss: [N] of the plainly trained model.
        labels: int64 [N].
        count: of each side, ≥ 1.

    Returns:
        int64 indices, ascending.
    """
    checks.rank("loss", checks.floating("loss", loss), "[N]")
    check_labels(labels, len(loss), int(labels.max()) + 1 if len(labels) else 1)
    if checks.integer("count", count) < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    chosen = []
    for label in labels.unique():
        of_class = (labels == label).nonzero()[:, 0]
        order = of_class[loss[of_class].argsort(stable=True)]
        each = min(count, len(order) // 2)
        chosen += [order[:each], order[len(order) - each :]]
    return torch.cat(chosen).sort().values if chosen else labels.new_empty(0)


def _highest_of_each_class(score: Tensor, labels: Tensor, count: int) -> Tensor:
    present = labels.unique()
    each = max(count // max(len(present), 1), 1)
    chosen = []
    for label in present:
        of_class = (labels == label).nonzero()[:, 0]
        chosen.append(of_class[score[of_class].argsort(descending=True, stable=True)[:each]])
    return torch.cat(chosen).sort().values if chosen else labels.new_empty(0)


def fit_last_layer(
    feature: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    sample_weight: Tensor | None = None,
    pull: float = 0.0,
    iterations: int = 500,
) -> tuple[Tensor, Tensor | None]:
    """Fit a linear layer to all samples at once, from and towards the layer given:

        Σ_i w_i CE(W f_i + b, y_i) + pull · ‖θ − θ_0‖²,    Σ w_i = 1

    Convex; solved by L-BFGS in float64. With `pull` > 0 the solution is unique. With 0 and separable samples it has
    none, and the layer is what `iterations` make of it.

    Args:
        feature: [N,D], what the layer reads.
        labels: int64 [N] in [0,K).
        weight, bias: the layer that is begun from, [K,D] and [K] or None; `θ_0`.
        sample_weight: [N] ≥ 0 of any sum; None: all alike.
        pull: λ ≥ 0, towards the layer that is begun from.
        iterations: of L-BFGS at most.

    Returns:
        (weight, bias) as the ones given, in their dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> import torch
        >>> from debiaskd.bias import fit_last_layer
        >>> feature, labels = torch.tensor([[1.0], [2.0], [-1.0], [-2.0]]), torch.tensor([0, 0, 1, 1])
        >>> weight, bias = fit_last_layer(feature, labels, torch.zeros(2, 1), torch.zeros(2), pull=0.01)
        >>> (feature @ weight.T + bias).argmax(1)
        tensor([0, 0, 1, 1])

    Source: Qiu et al. 2023, the loss of AFR's second stage.
    """
    checks.rank("feature", checks.floating("feature", feature), "[N,D]")
    checks.rank("weight", checks.floating("weight", weight), "[K,D]")
    checks.shape("weight", weight, "[K,D]", [weight.shape[0], feature.shape[1]])
    check_labels(labels, len(feature), len(weight))
    if not len(feature):
        raise ValueError("feature must hold at least one sample, got none")
    pull = checks.number("pull", pull, minimum=0)
    share = torch.ones(len(feature)) if sample_weight is None else sample_weight.detach()
    checks.shape("sample_weight", share, "[N]", [len(feature)])
    share = share.double()
    if not bool(share.isfinite().all()) or float(share.min()) < 0 or float(share.sum()) <= 0:
        raise ValueError("sample_weight must be finite and >= 0, and > 0 somewhere")
    share = share / share.sum()
    rows = feature.detach().double()
    start = [weight.detach().double()] + ([] if bias is None else [bias.detach().double()])
    found = [tensor.clone().requires_grad_() for tensor in start]
    solver = torch.optim.LBFGS(
        found, max_iter=iterations, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        logits = F.linear(rows, found[0], None if bias is None else found[1])
        loss = (share * F.cross_entropy(logits, labels, reduction="none")).sum()
        for tensor, origin in zip(found, start):
            loss = loss + pull * (tensor - origin).square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    fitted = [tensor.detach() for tensor in found]
    if not all(bool(tensor.isfinite().all()) for tensor in fitted):
        raise ValueError("feature must be such that the fit converges, got weights that are not finite")
    return fitted[0].to(weight.dtype), None if bias is None else fitted[1].to(bias.dtype)
