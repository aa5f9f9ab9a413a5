"""`torch.nn.Module` faces of the functional losses: options at construction, tensors at the call."""

from __future__ import annotations

from torch import Tensor, nn

from debiaskd import checks
from debiaskd.boxes import Boxes
from debiaskd.ops.backend import REDUCTIONS
from debiaskd.ops.feature_match import feature_match_loss
from debiaskd.ops.localization import KINDS, localization_loss


class FeatureMatchLoss(nn.Module):
    """`feature_match_loss` with its options fixed.

    Example:
        >>> import torch
        >>> FeatureMatchLoss(reduction="sum")(torch.zeros(2, 4), torch.ones(2, 4)).item()
        2.0
    """

    def __init__(self, *, normalize: bool = False, reduction: str = "mean") -> None:
        super().__init__()
        checks.flag("normalize", normalize)
        checks.option("reduction", reduction, tuple(REDUCTIONS))
        self.normalize, self.reduction = normalize, reduction

    def forward(self, student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
        return feature_match_loss(student, teacher, weight, normalize=self.normalize, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, reduction={self.reduction!r}"


class LocalizationLoss(nn.Module):
    """`localization_loss` with its options fixed.

    Example:
        >>> import torch
        >>> LocalizationLoss(kind="l1")(torch.ones(1, 4, 4), Boxes.from_lists([[[0, 0, 4, 4]]])).item()
        0.0
    """

    def __init__(
        self,
        *,
        kind: str = "energy",
        size: tuple[int, int] | None = None,
        normalize: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        checks.option("kind", kind, tuple(KINDS))
        checks.flag("normalize", normalize)
        checks.option("reduction", reduction, tuple(REDUCTIONS))
        self.kind, self.normalize, self.reduction = kind, normalize, reduction
        self.size = None if size is None else checks.size("size", size)

    def forward(self, attribution: Tensor, boxes: Boxes) -> Tensor:
        return localization_loss(
            attribution, boxes, kind=self.kind, size=self.size, normalize=self.normalize, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, size={self.size}, normalize={self.normalize}, reduction={self.reduction!r}"


class EnergyLoss(LocalizationLoss):
    """`energy_loss` with its options fixed: `LocalizationLoss` of kind "energy"."""

    def __init__(self, *, size: tuple[int, int] | None = None, reduction: str = "mean") -> None:
        super().__init__(kind="energy", size=size, reduction=reduction)
