"""Class contexts: the mean feature of each class, weighted by how sure the teacher is, for backdoor adjustment.

Formula, with the weights w_i = softmax(u_i / T)[y_i] of the teacher's logits u:

    sums_c = sum_(i: y_i = c) w_i s_i        masses_c = sum_(i: y_i = c) w_i        context_c = sums_c / masses_c

Sums and masses add over batches and ranks; the division comes once, at the end. Nothing here has a gradient.

Source: Deng & Zhang 2021 (CID).

A composition of PyTorch ops, the same under every backend, and without a kernel: reading the features once is the
floor, and what stands above it is a fraction of a millisecond a batch, beside the network that made the features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from debiaskd.ops.labels import check_labels
from debiaskd.utils import checks


@torch.no_grad()
def class_context(
    feature: Tensor, logits: Tensor, labels: Tensor, num_classes: int, *, temperature: float = 4.0
) -> tuple[Tensor, Tensor]:
    """Each class's weighted sum of features, and the sum of its weights, over one batch.

    Args:
        feature: [N,D] pooled student features; taken as constants. Any floating dtype, any strides.
        logits: [N,K] of the teacher; any floating dtype; a constant.
        labels: int64 [N] in [0,K).
        num_classes: K.
        temperature: T > 0 of the softmax that weighs the samples.

    Returns:
        ([K,D] weighted sums, [K] masses): add both over batches (and over ranks, with `all_reduce`), then divide.
        Classes that did not occur are 0 in both. float32 for half precisions, else the dtype of feature. No gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> feature = torch.tensor([[1.0, 3.0], [5.0, 7.0], [2.0, 2.0]])
        >>> sums, masses = class_context(feature, torch.zeros(3, 2), torch.tensor([0, 0, 1]), 2)
        >>> sums / masses[:, None]
        tensor([[3., 5.],
                [2., 2.]])

    Source: Deng & Zhang 2021 (CID).
    """
    temperature = _check(feature, logits, labels, num_classes, temperature)
    wide = torch.promote_types(feature.dtype, torch.float32)
    weight = (logits.to(wide) / temperature).softmax(1).gather(1, labels[:, None])
    add = added if feature.device.type == "cpu" else multiplied
    return add(feature.to(wide), weight, labels, num_classes)


def added(feature: Tensor, weight: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Row by row, in order: on the CPU the same bits in every run, and the fastest."""
    sums = feature.new_zeros(num_classes, feature.shape[1]).index_add_(0, labels, weight * feature)
    return sums, weight.new_zeros(num_classes).index_add_(0, labels, weight[:, 0])


def multiplied(feature: Tensor, weight: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """As a product of matrices: adding rows on a GPU would take atomics, whose order changes from run to run."""
    chosen = weight.new_zeros(len(labels), num_classes).scatter_(1, labels[:, None], weight)
    with torch.autocast(feature.device.type, enabled=False):
        return chosen.T @ feature, chosen.sum(0)


def _check(feature: Tensor, logits: Tensor, labels: Tensor, num_classes: int, temperature: float) -> float:
    checks.floating("feature", feature)
    checks.floating("logits", logits)
    checks.rank("feature", feature, "[N,D]")
    if checks.integer("num_classes", num_classes) < 1:
        raise ValueError(f"num_classes must be >= 1, got {num_classes}")
    checks.shape("logits", logits, "[N,K]", [feature.shape[0], num_classes])
    checks.same_device("logits", logits, "feature", feature)
    checks.constant("logits", logits)
    check_labels(labels, "feature", feature, num_classes)
    return checks.number("temperature", temperature, minimum=0.0, exclusive=True)
