"""What helpers/triton_compile.py compiles: for each op a module of calls, and what is expected of their launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """A call of an op's kernel module, given to it as `call(module)`.

    launches: the kernels that it starts, in their order.
    wide: kernel -> how many loads and how many stores of 16 bytes each thread makes, at least. A tile of 4096 float32
        is 4 of them for each of 256 threads. Kernels not named here move what they can.
    long: has sizes beyond 32 bits, so that no product may have 32.
    aside: kernel -> bytes of registers that may be kept in memory, because none of that happens where time is spent.
    """

    call: Callable[[Any], object]
    launches: tuple[str, ...]
    wide: dict[str, tuple[int, int]] = field(default_factory=dict)
    long: bool = False
    aside: dict[str, int] = field(default_factory=dict)


def some(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
