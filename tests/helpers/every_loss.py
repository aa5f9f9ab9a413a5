"""Every loss in one list, for what must hold for all of them: autograd's rules, compilation, threads, modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import Way, attribution, normal, uniform, way_param, ways

import debiaskd as dk


@dataclass(frozen=True)
class Loss:
    """`input` is what gets the gradient, `call(input, constants, **options)` the loss; `constants` is all else."""

    name: str
    op: str
    input: Callable[..., torch.Tensor]
    constants: Callable[..., tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)

    def call(self, values: torch.Tensor, constants: tuple[Any, ...], **options: Any) -> torch.Tensor:
        function = dk.feature_match_loss if self.op == "feature_match" else dk.localization_loss
        return function(values, *constants, **self.options, **options)

    def module(self, **options: Any) -> torch.nn.Module:
        kind = dk.FeatureMatchLoss if self.op == "feature_match" else dk.LocalizationLoss
        return kind(**self.options, **options)

    def make(self, way: Way, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, tuple[Any, ...]]:
        constants = (x.to(way.device) if isinstance(x, dk.Boxes) else way.put(x) for x in self.constants(dtype))
        return way.put(self.input(dtype)).requires_grad_(), tuple(constants)


def _feature_match(name: str, weighted: bool, **options: Any) -> Loss:
    def constants(dtype: torch.dtype) -> tuple[Any, ...]:
        teacher = normal(3, 4, 5, 6, seed=1, dtype=dtype)
        return (teacher, uniform(3)) if weighted else (teacher,)

    return Loss(name, "feature_match", lambda dtype: normal(3, 4, 5, 6, dtype=dtype), constants, options)


def _localization(kind: str, size: tuple[int, int] | None, name: str) -> Loss:
    def boxes(dtype: torch.dtype) -> tuple[Any, ...]:
        return (dk.Boxes.from_lists([[[2, 1, 9, 6], [5, 4, 12, 40]], [], None]),)

    return Loss(
        name,
        "localization",
        lambda dtype: attribution(kind, 3, 8, 35, dtype=dtype),
        boxes,
        {"kind": kind, "size": size},
    )


LOSSES = [
    _feature_match("feature_match", False),
    _feature_match("feature_match_relative", True, normalize=True),
    *(_localization(kind, None, kind) for kind in ("energy", "l1", "ppce", "rrr")),
    *(_localization(kind, (16, 70), f"{kind}_upsampled") for kind in ("energy", "rrr")),
]


def _pairs(backends: tuple[str, ...] | None) -> list[Any]:
    return [
        way_param(way, f"{loss.name}-{way.name}", loss)
        for loss in LOSSES
        for way in ways(loss.op)
        if backends is None or way.name in backends
    ]


every_loss_every_way = pytest.mark.parametrize(("loss", "way"), _pairs(None))
every_native_loss = pytest.mark.parametrize(("loss", "way"), _pairs(("cpp", "triton")))
