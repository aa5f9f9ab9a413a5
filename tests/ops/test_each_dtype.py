"""One case of each op, dtype and backend against float64: the first that a new machine should run."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, Way, assert_accurate, way_param, ways
from op_calls import CALLS, Call, loss_and_gradient

import debiaskd as dk

NAMES = ("feature_match", "localization-energy-64", "map_cosine-64", "channel_dot", "class_relation", "backdoor-exact")
EVERY = [
    way_param(way, f"{call.op}-{str(dtype).removeprefix('torch.')}-{way.name}", call, dtype)
    for call in CALLS
    if call.name in NAMES
    for dtype in DTYPES
    for way in ways(call.op)
]


def inputs_of(call: Call, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The values that the narrow dtype can hold, in float64."""
    return tuple(x.to(dtype).double() if x.is_floating_point() else x for x in call.inputs())


@pytest.mark.parametrize(("call", "dtype", "way"), EVERY)
def test_loss_and_gradient_agree_with_float64(call: Call, dtype: torch.dtype, way: Way) -> None:
    def result(device: str, in_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        made = [x.to(device, in_dtype) if x.is_floating_point() else x.to(device) for x in inputs_of(call, dtype)]
        return loss_and_gradient(call, (made[0].requires_grad_(), *made[1:]))

    with dk.backend("eager"):
        exact, eager = result("cpu", torch.float64), result(way.device, dtype)
    with way.active():
        found = result(way.device, dtype)
    for what, actual, wanted, plain in zip(("loss", "gradient"), found, exact, eager):
        assert_accurate(actual.cpu(), wanted, plain.cpu(), what)


def test_every_op_with_kernels_has_a_case() -> None:
    from debiaskd.ops.backend import IMPLEMENTATIONS

    differentiable = {op for op, names in IMPLEMENTATIONS.items() if "triton" in names}
    assert {call.op for call in CALLS if call.name in NAMES} == differentiable
