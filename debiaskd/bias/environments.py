"""Environments by EIIL: the two-way split of the samples on which a fixed model is least invariant.

Creager et al. 2021, "Environment Inference for Invariant Learning" (arXiv 2010.07249). With the logits `l_i` of the
fixed model and a scale `s` of all logits, the IRMv1 penalty of soft assignments `q_i` in [0,1] is

    A(q)² + (G − A(q))²,    A(q) = mean_i q_i g_i,    G = mean_i g_i,    g_i = d CE(s · l_i, y_i) / ds at s = 1

The paper maximises it by Adam over the logits of `q`. That is not needed: it is a convex function of `A`, so that its
maximum over the interval that `A` can reach lies at both ends, where `q_i` is 1 exactly for `g_i > 0`, or for `g_i <
0`; both ends have the same value. `g_i = Σ_k (p_ik − 1[k = y_i]) l_ik` is positive where the model would lose less
with smaller logits (samples it gets wrong, or is too sure about), and negative where it would gain from larger ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from debiaskd.bias.groups import FoundGroups
from debiaskd.utils import checks


def scale_gradients(logits: Tensor, labels: Tensor) -> Tensor:
    """Derivative [N] of each sample's cross-entropy by a common scale of the logits, at scale 1.

    Args:
        logits: [N,K] of the fixed model.
        labels: int64 [N] in [0,K).
    """
    check_logits(logits, labels)
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float64))
    own = wide.gather(1, labels[:, None])[:, 0]
    # Relative to the own class's logit, which cross-entropy does not notice, so that sure and right samples give 0.
    return (wide.softmax(1) * (wide - own[:, None])).sum(1)


def environment_penalty(logits: Tensor, labels: Tensor, assignment: Tensor) -> float:
    """IRMv1 penalty of the environments `assignment` and `1 − assignment`; what EIIL maximises.

    Args:
        logits: [N,K] of the fixed model.
        labels: int64 [N] in [0,K).
        assignment: [N] in [0,1], how far each sample belongs to the first environment.
    """
    gradients = scale_gradients(logits, labels)
    share = assignment.to(gradients)
    checks.shape("assignment", share, "[N]", [len(gradients)])
    first, both = float((share * gradients).mean()), float(gradients.mean())
    return first**2 + (both - first) ** 2


def infer_environments(logits: Tensor, labels: Tensor) -> Tensor:
    """The environments [N] of EIIL, 1 where the fixed model would lose less with smaller logits, else 0.

    Args:
        logits: [N,K] of a plainly trained model, in any floating dtype.
        labels: int64 [N] in [0,K).

    Returns:
        int64 [N]. Together with the class it is a group: `labels * 2 + environment`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> import torch
        >>> from debiaskd.bias import infer_environments
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
        >>> infer_environments(logits, torch.tensor([0, 1, 1]))  # right, wrong, right
        tensor([0, 1, 0])

    Source: Creager et al. 2021; solved in closed form (module docstring).
    """
    return (scale_gradients(logits, labels) > 0).long()


def find_environments(logits: Tensor, labels: Tensor) -> FoundGroups:
    """Groups within each class by EIIL's environments, two in a class at most.

    Args:
        logits: [N,K] of a plainly trained model that has not fitted the samples yet: after few epochs, or held out.
        labels: int64 [N] in [0,K).

    Returns:
        `FoundGroups`, cluster 0 the larger of a class's two. The confidence is the margin |p_y − max_{k≠y} p_k|.

    Example:
        >>> import torch
        >>> from debiaskd.bias import find_environments
        >>> logits = torch.tensor([[4.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
        >>> find_environments(logits, torch.tensor([0, 0, 0])).clusters
        tensor([0, 0, 1])

    Source: Creager et al. 2021, section 4: environments within each class.
    """
    environment = infer_environments(logits, labels).cpu()
    labels = labels.cpu()
    clusters = torch.zeros_like(labels)
    for label in labels.unique():
        of_class = labels == label
        rare = int(2 * environment[of_class].sum() <= of_class.sum())  # 1: the smaller one is the one with g > 0
        clusters[of_class] = (environment[of_class] == rare).long()
        if len(clusters[of_class].unique()) == 1:
            clusters[of_class] = 0
    probability = logits.detach().double().softmax(1).cpu()
    own = probability.gather(1, labels[:, None])[:, 0]
    other = probability.scatter(1, labels[:, None], -1.0).amax(1).clamp(min=0)
    return FoundGroups(labels, clusters, (own - other).abs())


def check_logits(logits: Tensor, labels: Tensor) -> None:
    checks.rank("logits", checks.floating("logits", logits), "[N,K]")
    check_labels(labels, len(logits), logits.shape[1])
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits must be finite, got NaN or infinity")


def check_labels(labels: Tensor, samples: int, classes: int) -> None:
    """int64 [samples] in [0, classes)."""
    checks.shape("labels", checks.tensor("labels", labels), "[N]", [samples])
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if samples and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must lie in [0, {classes}), got values in [{int(labels.min())}, {int(labels.max())}]")
