"""Every loss in one list, for what must hold for all of them: autograd's rules, compilation, threads, modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import Way, attribution, normal, uniform, way_param, ways

import debiaskd as dk

FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "feature_match": dk.feature_match_loss,
    "localization": dk.localization_loss,
    "map_cosine": dk.map_cosine_loss,
}
MODULES: dict[str, type[torch.nn.Module]] = {
    "feature_match": dk.FeatureMatchLoss,
    "localization": dk.LocalizationLoss,
    "map_cosine": dk.MapCosineLoss,
}


@dataclass(frozen=True)
class Loss:
    """`input` is what gets the gradient, `call(input, constants, **options)` the loss; `constants` is all else."""

    name: str
    op: str
    input: Callable[..., torch.Tensor]
    constants: Callable[..., tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)

    def call(self, values: torch.Tensor, constants: tuple[Any, ...], **options: Any) -> torch.Tensor:
        return FUNCTIONS[self.op](values, *constants, **self.options, **options)

    def module(self, **options: Any) -> torch.nn.Module:
        return MODULES[self.op](**self.options, **options)

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


def _map_cosine(name: str, size: tuple[int, int]) -> Loss:
    def constants(dtype: torch.dtype) -> tuple[Any, ...]:
        return normal(3, 8, 35, seed=1, dtype=dtype), uniform(3)

    return Loss(name, "map_cosine", lambda dtype: normal(3, *size, dtype=dtype), constants)


LOSSES = [
    _feature_match("feature_match", False),
    _feature_match("feature_match_relative", True, normalize=True),
    *(_localization(kind, None, kind) for kind in ("energy", "l1", "ppce", "rrr")),
    *(_localization(kind, (16, 70), f"{kind}_upsampled") for kind in ("energy", "rrr")),
    _map_cosine("map_cosine", (8, 35)),
    _map_cosine("map_cosine_upsampled", (4, 9)),
]


def _pairs(backends: tuple[str, ...] | None) -> list[Any]:
    return [
        way_param(way, f"{loss.name}-{way.name}", loss)
        for loss in LOSSES
        for way in ways(loss.op)
        if backends is None or way.name in backends
    ]


every_loss_every_way = pytest.mark.parametrize(("loss", "way"), _pairs(None))


def _of_each_op(pairs: list[Any]) -> list[Any]:
    """Without pairs that differ in what is a mere argument of a native op, or that eager has in another pair."""
    native = ("feature_match", "energy", "rrr_upsampled", "map_cosine_upsampled")
    eager = ("feature_match_relative", "energy_upsampled", "l1", "ppce", "rrr", "map_cosine_upsampled")
    return [pair for pair in pairs if pair.values[0].name in (eager if _is_eager(pair) else native)]


def _of_other_shapes(pairs: list[Any]) -> list[Any]:
    """What reads boxes, what reads pairs of maps, and what reads features; with and without interpolation."""
    native = ("feature_match", "rrr_upsampled", "map_cosine")
    eager = ("feature_match", "energy_upsampled", "ppce", "map_cosine_upsampled")
    return [pair for pair in pairs if pair.values[0].name in (eager if _is_eager(pair) else native)]


def _is_eager(pair: Any) -> bool:
    return bool(pair.values[1].name.startswith("eager"))


every_loss_once = pytest.mark.parametrize(("loss", "way"), _of_each_op(_pairs(None)))
every_loss_of_other_shapes = pytest.mark.parametrize(("loss", "way"), _of_other_shapes(_pairs(None)))
every_native_loss = pytest.mark.parametrize(("loss", "way"), _pairs(("cpp", "triton")))
every_native_loss_once = pytest.mark.parametrize(("loss", "way"), _of_each_op(_pairs(("cpp", "triton"))))
