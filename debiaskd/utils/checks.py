"""Argument checks. Every message names the argument, what was expected and what came.

Wrong kinds of thing (not a tensor, an integer dtype) raise `TypeError`; right kinds with wrong contents (shape,
device, range, option) raise `ValueError`. All checks here read metadata only, except `finite_nonnegative` and the end
of `packed_boxes`, which read values and therefore run only where reading them costs no device synchronisation. On a GPU
`DEBIASKD_DEBUG=1` has the same conditions checked by asserts that run there (`on_device`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def floating(name: str, value: object) -> Tensor:
    value = tensor(name, value)
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    return value


def rank(name: str, value: Tensor, dimensions: str) -> None:
    """`dimensions` names the expected axes, such as "[N,H,W]"."""
    expected = dimensions.count(",") + 1
    if value.dim() != expected:
        raise ValueError(f"{name} must have shape {dimensions}, got {list(value.shape)}")


def shape(name: str, value: Tensor, dimensions: str, expected: Sequence[int]) -> None:
    """`dimensions` names the axes of `expected`, such as "[N]"."""
    if value.shape != expected and tuple(value.shape) != tuple(expected):  # mostly a shape, compared at once
        raise ValueError(f"{name} must have shape {dimensions}={list(expected)}, got {list(value.shape)}")


def same_device(name: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(f"{name} must be on the device of {reference_name}, {reference.device}, got {value.device}")


def same_dtype(name: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    if value.dtype != reference.dtype:
        raise TypeError(f"{name} must have the dtype of {reference_name}, {reference.dtype}, got {value.dtype}")


def constant(name: str, value: Tensor) -> None:
    """A teacher or a weight: the loss gives it no gradient, so one that asks for a gradient is a mistake."""
    if value.requires_grad:
        raise ValueError(
            f"{name} must not require grad (it gets no gradient here), got requires_grad=True: "
            f"pass {name}.detach() or compute it under torch.no_grad()"
        )


def option(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return value


def sequence(name: str, value: Any) -> Any:
    """Anything that has a length and can be walked through."""
    if not hasattr(value, "__len__") or not hasattr(value, "__iter__") or isinstance(value, str):
        raise TypeError(f"{name} must be a sequence, got {type(value).__name__}")
    return value


def convertible(name: str, value: Any, expected: str) -> Tensor:
    """As a tensor: lists, arrays, tensors. `expected` says in words what it should have been."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be {expected}, got {value!r} ({error})") from None


def is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def number(name: str, value: object, *, minimum: float = -math.inf, exclusive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    too_small = value <= minimum if exclusive else value < minimum
    if not math.isfinite(value) or too_small:
        bound = "" if minimum == -math.inf else f" {'>' if exclusive else '>='} {minimum:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return float(value)


def size(name: str, value: object) -> tuple[int, int]:
    """A (height, width) pair of positive integers."""
    if (
        isinstance(value, Tensor)
        or not isinstance(value, Sequence)
        or len(value) != 2
        or not all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    ):
        raise TypeError(f"{name} must be a (height, width) pair of integers, got {value!r}")
    if min(value) < 1:
        raise ValueError(f"{name} must be (height, width), both >= 1, got {tuple(value)}")
    return int(value[0]), int(value[1])


#: Whether one of `torch.func`'s transforms is at work, as torch itself asks before each autograd.Function.
_transforms: Callable[[], bool] = torch._C._are_functorch_transforms_active


def transformed() -> bool:
    """Whether tensors may carry more than values: under `torch.func`'s transforms and forward-mode differentiation."""
    return forward_ad._current_level >= 0 or _transforms()


def readable(value: Tensor) -> bool:
    """Whether looking at values costs nothing and can be done: on the CPU, outside of compiled graphs and of `vmap`."""
    if value.device.type != "cpu" or value.numel() == 0 or torch.compiler.is_compiling():
        return False
    return not (transformed() and _batched(value))


def _batched(value: Tensor) -> bool:
    """Whether `vmap` is among the transforms that a tensor is wrapped by."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        if torch._C._functorch.is_batchedtensor(value):
            return True
        value = torch._C._functorch.get_unwrapped(value)
    return False


#: Whether values on a GPU are checked: DEBIASKD_DEBUG=1 in the environment when the package is imported.
DEBUG = os.environ.get("DEBIASKD_DEBUG") == "1"
_UNASSERTED = ("cpu", "meta")  # device types whose values are read, or do not exist


def on_device(value: Tensor, condition: Callable[[], Tensor], message: str) -> None:
    """Assert on the device that `condition()`, a boolean scalar made from `value`, holds, with DEBIASKD_DEBUG=1.

    Nothing waits for the answer: a failed assert ends the process' use of that GPU, as PyTorch's own do, and the next
    call that synchronises raises. Nothing is checked in compiled graphs and under `vmap`.
    """
    if not DEBUG or value.device.type in _UNASSERTED or value.numel() == 0 or torch.compiler.is_compiling():
        return
    if not (transformed() and _batched(value)):
        torch._assert_async(condition(), message)


def finite_nonnegative(name: str, value: Tensor) -> None:
    """Values, not only metadata: on the CPU and outside of a compiled graph, where looking costs nothing."""
    if not readable(value):
        message = f"{name} must be finite and >= 0 everywhere"
        return on_device(value, lambda: ((value >= 0) & (value < math.inf)).all(), message)
    low, high = (float(v) for v in torch.aminmax(value))
    if not (low >= 0 and high < math.inf):
        raise ValueError(f"{name} must be finite and >= 0 everywhere, got values in [{low:g}, {high:g}]")


def sample_weight(value: Tensor, reference_name: str, reference: Tensor) -> None:
    """[N] >= 0 for the N samples of `reference`; a constant."""
    floating("weight", value)
    shape("weight", value, "[N]", reference.shape[:1])
    same_device("weight", value, reference_name, reference)
    constant("weight", value)
    finite_nonnegative("weight", value)


def packed_boxes(coords: Tensor, offsets: Tensor, labels: Tensor | None, annotated: Tensor | None) -> None:
    """What `Boxes` is made of: metadata everywhere, values on the CPU and outside of a compiled graph."""
    for name, value, dtype in (
        ("coords", coords, torch.int32),
        ("offsets", offsets, torch.int64),
        ("labels", labels, torch.int64),
        ("annotated", annotated, torch.bool),
    ):
        if value is None and name in ("labels", "annotated"):
            continue
        if tensor(name, value).dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {value.dtype}")  # type: ignore[union-attr]
        same_device(name, value, "coords", coords)  # type: ignore[arg-type]
    if coords.dim() != 2 or coords.shape[1] != 4:
        raise ValueError(f"coords must have shape [M,4], got {list(coords.shape)}")
    if offsets.dim() != 1 or offsets.numel() < 1:
        raise ValueError(f"offsets must have shape [N+1], got {list(offsets.shape)}")
    if labels is not None:
        shape("labels", labels, "[M]", [coords.shape[0]])
    if annotated is not None:
        shape("annotated", annotated, "[N]", [offsets.numel() - 1])
    if readable(offsets):
        return _box_values(coords, offsets)
    message = f"offsets must rise from 0 to the number of boxes, {coords.shape[0]}"
    on_device(
        offsets, lambda: (offsets[0] == 0) & (offsets[-1] == coords.shape[0]) & (offsets.diff() >= 0).all(), message
    )
    on_device(coords, lambda: (coords[:, 2:] >= coords[:, :2]).all(), "coords must have x0 <= x1 and y0 <= y1")


def _box_values(coords: Tensor, offsets: Tensor) -> None:
    if int(offsets[0]) != 0 or int(offsets[-1]) != coords.shape[0] or bool((offsets.diff() < 0).any()):
        shown = offsets.tolist() if offsets.numel() <= 9 else [*offsets[:4].tolist(), "...", int(offsets[-1])]
        raise ValueError(f"offsets must rise from 0 to the number of boxes, {coords.shape[0]}, got {shown}")
    inverted = (coords[:, 2:] < coords[:, :2]).any(1)
    if bool(inverted.any()):
        row = int(inverted.nonzero()[0])
        raise ValueError(f"coords[{row}] must have x0 <= x1 and y0 <= y1, got {coords[row].tolist()} (inverted box)")
