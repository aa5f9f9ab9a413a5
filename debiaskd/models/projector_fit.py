"""Fit the linear projector of a transplanted student by least squares, without a training step.

The matched maps are a linear function of a "linear" projector's weights, so that the minimum of the (weighted) match
loss over them has a closed form: a ridge regression from the student's last map to the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from debiaskd.models.transplant import Transplanted, match_spatial
from debiaskd.utils import checks


class _Moments:
    """Weighted sums over the positions of all maps, in float64."""

    def __init__(self) -> None:
        self.weight: Tensor | float = 0.0
        self.inputs: Tensor | float = 0.0
        self.outputs: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0
        self.products: Tensor | float = 0.0
        self.energy: Tensor | float = 0.0

    def add(self, student: Tensor, teacher: Tensor, weight: Tensor | None) -> None:
        """Add maps [N,C,H,W] and [N,D,H,W] or vectors [N,C] and [N,D], and weights [N]."""
        if student.device.type == "mps":  # has no float64
            student, teacher = student.cpu(), teacher.cpu()
        positions = student[0, 0].numel()
        x, y = _rows(student), _rows(teacher)
        weight = torch.ones(len(student)) if weight is None else weight
        shares = weight.to(x).repeat_interleave(positions) / positions
        weighted = x * shares[:, None]
        self.weight = self.weight + shares.sum()
        self.inputs = self.inputs + weighted.sum(0)
        self.outputs = self.outputs + shares @ y
        self.squares = self.squares + weighted.T @ x
        self.products = self.products + weighted.T @ y
        self.energy = self.energy + shares @ y.square()

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        for name, value in vars(self).items():
            setattr(self, name, total(torch.as_tensor(value)).cpu())

    def solve(self, ridge: float) -> tuple[Tensor, Tensor, float]:
        """(weight [D,C], bias [D], explained share of the teacher's variance)."""
        weight, inputs, outputs, squares, products, energy = (torch.as_tensor(value) for value in vars(self).values())
        mean, target = inputs / weight, outputs / weight
        covariance = squares / weight - torch.outer(mean, mean)
        cross = products / weight - torch.outer(mean, target)
        penalty = ridge * covariance.diagonal().mean()
        damped = covariance + penalty * torch.eye(len(mean), dtype=torch.float64)
        found = torch.linalg.lstsq(damped, cross).solution if penalty == 0 else torch.linalg.solve(damped, cross)
        variance = (energy / weight - target.square()).sum()
        error = variance - 2 * (found * cross).sum() + (found * (covariance @ found)).sum()
        explained = 1 - float(error / variance) if variance > 0 else 1.0
        return found.T, target - mean @ found, explained


def _rows(value: Tensor) -> Tensor:
    """[N,C,H,W] or [N,C] as float64 [N·H·W,C]."""
    return value.double().flatten(2).movedim(1, -1).flatten(0, 1) if value.dim() > 2 else value.double()


def fit_projector(
    student: Transplanted,
    batches: Iterable[tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]],
    *,
    ridge: float = 0.1,
    total: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Set a linear projector to the minimum of the match loss over its weights, the student's body held fixed.

    A ridge regression from the body's maps to the teacher's maps, of one pass over the images. The student is run in
    evaluation mode. With sample weights it is the minimum of DeTT's weighted loss: a student that classifies with the
    debiased head before its first training step. The sums are float64 and take (C_s + C_t)·C_s numbers.

    Args:
        student: of `dk.transplant(..., projector="linear")`; its projector's weight and bias are overwritten.
        batches: (images [N,...] on the student's device, the teacher's maps [N,C_t,H,W] or vectors [N,C_t]), and
            optionally sample weights [N]; pooled to a common size as by `match_spatial`.
        ridge: penalty on squared weights, as a share of the mean variance of the body's channels; 0: none.
        total: sums a tensor over processes that each read a part of the images; None: one process reads all.

    Returns:
        The share of the teacher maps' (weighted) variance that the projector explains, at most 1.

    Raises:
        TypeError: no transplanted student; its projector is not linear.
        ValueError: no images, no positive weight, `ridge` negative, values that are not finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from debiaskd.models.projector_fit import fit_projector
        >>> from debiaskd.models.transplant import transplant
        >>> def network(width):
        ...     body = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU())
        ...     return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))
        >>> teacher, images = network(8).eval(), torch.randn(64, 3, 16, 16)
        >>> student = transplant(teacher, network(4), projector="linear", layer="0", head="3")
        >>> explained = fit_projector(student, [(images, teacher[0](images))])
        >>> 0 < explained <= 1
        True
    """
    if not isinstance(student, Transplanted):
        raise TypeError(f"student must be made by dk.transplant, got {type(student).__name__}")
    if not isinstance(student.projector, nn.Conv2d):
        raise TypeError(f"student.projector must be of projector='linear', got {type(student.projector).__name__}")
    checks.number("ridge", ridge, minimum=0)
    sums, training = _Moments(), [module for module in student.modules() if module.training]
    student.eval()
    try:
        with torch.no_grad():
            for images, teacher, *rest in batches:
                sums.add(*match_spatial(student.body(images).float(), teacher.float()), rest[0] if rest else None)
    finally:
        for module in training:
            module.training = True
    if isinstance(sums.weight, float):
        raise ValueError("batches must hold at least one image, got none")
    sums.reduce(total or (lambda value: value))
    if not all(bool(torch.as_tensor(value).isfinite().all()) for value in vars(sums).values()):
        raise ValueError("batches must give finite maps and weights, got NaN or infinity")
    if not float(sums.weight) > 0:
        raise ValueError(f"batches must hold a positive weight, got a sum of {float(sums.weight)}")
    weight, bias, explained = sums.solve(ridge)
    with torch.no_grad():
        student.projector.weight.copy_(weight[:, :, None, None])
        assert student.projector.bias is not None
        student.projector.bias.copy_(bias)
    return explained
