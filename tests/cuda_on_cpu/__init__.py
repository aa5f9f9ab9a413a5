"""The CUDA sources, compiled for the CPU (cuda_on_cpu.h says how), in place of a GPU:

with cuda_on_cpu.active():
    dk.feature_match_loss(...)  # on CPU tensors, by csrc/cuda/feature_match.cu

How a launch is cut depends on the number of multiprocessors. Half of the tests see 1 of them and half see 132, as an
H100 has, by their names; test_cuda_on_cpu.py has cases of every op at both.
"""

from __future__ import annotations

import ctypes
import functools
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import native_build
import torch

import debiaskd as dk
from debiaskd.ops import backend

NAMESPACE = "debiaskd_on_cpu"
PROCESSORS = (1, 132)


@contextmanager
def active(processors: int | None = None, seed: int = 0) -> Iterator[None]:
    """Every op inside runs csrc/cuda on CPU tensors; `seed` shuffles the blocks of launches."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    if "cuda_on_cpu" not in test:
        raise RuntimeError(
            f"{test}: parametrize by cases.every_way, so that `-m` finds what needs this library's build"
        )
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    if processors is None:
        processors = PROCESSORS[zlib.crc32(test.encode()) % 2]
    library.cuda_on_cpu_start(ctypes.c_int64(processors), ctypes.c_uint(seed))
    namespace, devices = backend.NAMESPACES["cuda"], backend._DEVICES["cuda"]
    reason = backend.unavailable.pop("cuda", None)
    backend.NAMESPACES["cuda"], backend._DEVICES["cuda"] = NAMESPACE, ("cpu",)
    try:
        with dk.backend("cuda"):
            yield
    finally:
        backend.NAMESPACES["cuda"], backend._DEVICES["cuda"] = namespace, devices
        if reason is not None:
            backend.unavailable["cuda"] = reason


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none. Once, also where it fails: not every test is to try again."""
    try:
        path = str(native_build.build("cuda_on_cpu.so"))
        torch.ops.load_library(path)
        library = ctypes.CDLL(path)
    except (OSError, RuntimeError) as error:
        return str(error)
    for op, fake in backend.FAKES.items():
        torch.library.register_fake(f"{NAMESPACE}::{op}", fake)
    return library
