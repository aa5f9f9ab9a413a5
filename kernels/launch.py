"""How every kernel here is started: on the device and the stream of its tensors, or in Triton's interpreter."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

#: Whether Triton interprets kernels on the CPU instead of compiling them. It reads that when it is imported.
INTERPRETED: bool = triton.knobs.runtime.interpret
#: The interpreter pays by the operation and not by the element, and it is there for tests: tiles are larger in it, and
#: bounds low enough for tests to exceed. With DEBIASKD_GPU_TILES=1 it has the sizes of a GPU.
LARGE_TILES: bool = INTERPRETED and os.environ.get("DEBIASKD_GPU_TILES") != "1"
# The interpreter exchanges the functions of triton.language while a kernel runs: one kernel at a time.
_interpreter = threading.Lock()


def launch(kernel: Any, programs: int, like: Tensor, *arguments: Any, warps: int, **constants: Any) -> None:
    """Starts `programs` programs of a kernel, where `like` lies.

    The first call of its kind compiles, which cannot be captured in a CUDA graph; all others can.
    """
    with _at(like):
        # Whether x * y + z is rounded once or twice should not depend on the default of a Triton version.
        kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=True)


def _at(tensor: Tensor) -> AbstractContextManager[Any]:
    if tensor.is_cpu or tensor.is_meta:  # what is meta is compiled for, and never run
        return _interpreting()
    guard: AbstractContextManager[Any] = torch.get_device_module(tensor.device).device_of(tensor)
    return guard


@contextmanager
def _interpreting() -> Iterator[None]:
    with _interpreter, np.errstate(all="ignore"):  # no GPU warns of infinities
        yield
