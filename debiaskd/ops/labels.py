"""The check that ops with one class label a sample share."""

from __future__ import annotations

import torch
from torch import Tensor

from debiaskd.utils import checks


def check_labels(labels: Tensor, reference_name: str, reference: Tensor, classes: int | None = None) -> None:
    """`labels` is int64 [N], one for each row of the reference, in [0, classes), or not negative where that is None.

    Values are looked at where that costs nothing: on the CPU, outside of a compiled graph and of `vmap`.
    """
    if checks.tensor("labels", labels).dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    checks.shape("labels", labels, "[N]", reference.shape[:1])
    checks.same_device("labels", labels, reference_name, reference)
    bound = ">= 0" if classes is None else f"in [0, {classes})"
    if not checks.readable(labels):
        most = torch.iinfo(torch.int64).max if classes is None else classes - 1
        message = f"labels must be {bound} everywhere"
        return checks.on_device(labels, lambda: ((labels >= 0) & (labels <= most)).all(), message)
    low, high = (int(v) for v in torch.aminmax(labels))
    if low < 0 or (classes is not None and high >= classes):
        raise ValueError(f"labels must be {bound} everywhere, got values in [{low}, {high}]")
