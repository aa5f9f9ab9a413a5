"""The losses as `torch.nn.Module`s: options at construction, tensors in `forward`."""

from __future__ import annotations

from torch import Tensor, nn

from debiaskd.boxes import Boxes
from debiaskd.ops.backdoor import MODES, backdoor_logits
from debiaskd.ops.backend import REDUCTIONS
from debiaskd.ops.channel_dot import channel_dot
from debiaskd.ops.class_context import class_context
from debiaskd.ops.class_relation import class_relation_loss
from debiaskd.ops.feature_match import feature_match_loss
from debiaskd.ops.kd import kd_loss
from debiaskd.ops.localization import KINDS, localization_loss
from debiaskd.ops.map_cosine import map_cosine_loss
from debiaskd.utils import checks


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


class MapCosineLoss(nn.Module):
    """`map_cosine_loss` with its options fixed.

    Example:
        >>> import torch
        >>> MapCosineLoss()(torch.ones(1, 2, 2), torch.ones(1, 4, 4)).item()
        0.0
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__()
        checks.option("reduction", reduction, tuple(REDUCTIONS))
        self.reduction = reduction

    def forward(self, student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
        return map_cosine_loss(student, teacher, weight, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


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

    def forward(self, attribution: Tensor, boxes: Boxes, ignore: Boxes | None = None) -> Tensor:
        return localization_loss(
            attribution,
            boxes,
            kind=self.kind,
            size=self.size,
            normalize=self.normalize,
            reduction=self.reduction,
            ignore=ignore,
        )

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, size={self.size}, normalize={self.normalize}, reduction={self.reduction!r}"


class EnergyLoss(LocalizationLoss):
    """`energy_loss` with its options fixed: `LocalizationLoss` of kind "energy".

    Example:
        >>> import torch
        >>> EnergyLoss()(torch.ones(1, 4, 4), Boxes.from_lists([[[0, 0, 2, 4]]])).item()
        0.5
    """

    def __init__(self, *, size: tuple[int, int] | None = None, reduction: str = "mean") -> None:
        super().__init__(kind="energy", size=size, reduction=reduction)


class ChannelDot(nn.Module):
    """`channel_dot` as a module; it has no options.

    Example:
        >>> import torch
        >>> ChannelDot()(torch.tensor([[2.0, 3.0]]), torch.ones(1, 2, 1, 2))
        tensor([[[5., 5.]]])
    """

    def forward(self, gradient: Tensor, feature: Tensor) -> Tensor:
        return channel_dot(gradient, feature)


class ClassRelationLoss(nn.Module):
    """`class_relation_loss` as a module; it has no options.

    Example:
        >>> import torch
        >>> ClassRelationLoss()(torch.ones(2, 3), torch.eye(2), torch.tensor([4, 4])).item()
        0.5
    """

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return class_relation_loss(student, teacher, labels)


class ClassContext(nn.Module):
    """`class_context` with its options fixed. It has no state: add up the returned sums.

    Example:
        >>> import torch
        >>> sums, masses = ClassContext(2)(torch.ones(3, 1), torch.zeros(3, 2), torch.tensor([0, 0, 1]))
        >>> sums.tolist(), masses.tolist()
        ([[1.0], [0.5]], [1.0, 0.5])
    """

    def __init__(self, num_classes: int, *, temperature: float = 4.0) -> None:
        super().__init__()
        if checks.integer("num_classes", num_classes) < 1:
            raise ValueError(f"num_classes must be >= 1, got {num_classes}")
        self.num_classes = num_classes
        self.temperature = checks.number("temperature", temperature, minimum=0.0, exclusive=True)

    def forward(self, feature: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return class_context(feature, logits, labels, self.num_classes, temperature=self.temperature)

    def extra_repr(self) -> str:
        return f"{self.num_classes}, temperature={self.temperature}"


class KdLoss(nn.Module):
    """`kd_loss` with its options fixed.

    Example:
        >>> import torch
        >>> KdLoss(temperature=1.0)(torch.zeros(3, 2), torch.zeros(3, 2)).item()
        0.0
    """

    def __init__(self, *, temperature: float = 4.0, reduction: str = "mean") -> None:
        super().__init__()
        self.temperature = checks.number("temperature", temperature, minimum=0.0, exclusive=True)
        checks.option("reduction", reduction, tuple(REDUCTIONS))
        self.reduction = reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, weight: Tensor | None = None) -> Tensor:
        return kd_loss(student_logits, teacher_logits, weight, temperature=self.temperature, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"


class BackdoorLogits(nn.Module):
    """`backdoor_logits` with its options fixed. The caller passes the head's weight and bias, and the context.

    Example:
        >>> import torch
        >>> feature, logits, context, weight = torch.ones(1, 2), torch.zeros(1, 3), torch.eye(3, 4), torch.eye(3, 6)
        >>> BackdoorLogits(mode="exact")(feature, logits, context, weight).shape
        torch.Size([1, 3])
    """

    def __init__(self, *, temperature: float = 4.0, mode: str = "nwgm") -> None:
        super().__init__()
        checks.option("mode", mode, MODES)
        self.temperature, self.mode = checks.number("temperature", temperature, minimum=0, exclusive=True), mode

    def forward(
        self,
        feature: Tensor,
        logits: Tensor,
        context: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        prior: Tensor | None = None,
    ) -> Tensor:
        return backdoor_logits(
            feature, logits, context, weight, bias, temperature=self.temperature, mode=self.mode, prior=prior
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, mode={self.mode!r}"
