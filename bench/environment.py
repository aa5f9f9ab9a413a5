"""Where a figure was measured: what a results file says about the machine and the versions."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from typing import Any

import torch

from debiaskd.ops.backend import build_record, unavailable
from debiaskd.version import __version__


def describe(device: str, memory_kept: bool) -> dict[str, Any]:
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "freed_memory": "kept" if memory_kept else "as the system does",
        "debiaskd": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "build": {name: how for name, how in build_record().items() if name in ("cpu", "cuda", "torch")},
        "unavailable": dict(unavailable),
    }
    if device == "cuda":
        record |= {
            "cuda": torch.version.cuda,
            "driver": driver_version(),
            "triton": triton_version(),
            "copy_bandwidth": copy_bandwidth(),
        }
    return record


def driver_version() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy within the GPU's memory of a size that no cache holds."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(20):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) * 1e-3)
    return 2 * source.numel() * source.element_size() / statistics.median(seconds)


def keep_freed_memory() -> bool:
    """Tells the C library to keep what it is given back, as allocators made for training do; returns whether it did.

    Without this, glibc returns a large block to the system or keeps it, depending on what happens to lie behind it, and
    every page of a block that was returned costs a fault at its next use: the same op then takes one or three times
    as long, by chance. Keeping memory helps those most that allocate most, which is eager.
    """
    trim_threshold, mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class CpuUse:
    """How much of the machine's processor time went to other processes meanwhile. Beyond a few per cent, figures of
    one run can still be compared with each other, but hardly with those of another."""

    def __init__(self) -> None:
        self.before = self._read()

    def share_of_others(self) -> float | None:
        now = self._read()
        if self.before is None or now is None:
            return None
        busy, own, total = (b - a for a, b in zip(self.before, now))
        return max(0.0, busy - own) / total if total > 0 else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            with open("/proc/stat") as lines:
                ticks = [int(field) for field in next(lines).split()[1:]]
        except (OSError, StopIteration, ValueError):
            return None
        per_second = os.sysconf("SC_CLK_TCK")
        idle = ticks[3] + ticks[4]
        total = sum(ticks[:8])
        return (total - idle) / per_second, sum(os.times()[:4]), total / per_second
