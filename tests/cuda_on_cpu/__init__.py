"""The CUDA sources, compiled for the CPU (cuda_on_cpu.h says how), in place of a GPU:

with cuda_on_cpu.active():
    dk.feature_match_loss(...)  # on CPU tensors, by csrc/cuda/feature_match.cu
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import native_build
import torch

import debiaskd as dk
from debiaskd.ops import backend

NAMESPACE = "debiaskd_on_cpu"


@contextmanager
def active() -> Iterator[None]:
    """Every op inside runs csrc/cuda on CPU tensors."""
    if failure := _load():
        raise RuntimeError(failure)
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
def _load() -> str | None:
    """Once, also where it fails: not every test is to try again."""
    try:
        torch.ops.load_library(str(native_build.build("cuda_on_cpu.so")))
    except (OSError, RuntimeError) as error:
        return str(error)
    for op, fake in backend.FAKES.items():
        torch.library.register_fake(f"{NAMESPACE}::{op}", fake)
    return None
