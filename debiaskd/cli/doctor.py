"""What runs here, and why: the text behind `debiaskd doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from typing import Any

import torch

from debiaskd.ops import backend
from debiaskd.version import __version__

EXTRAS = ("timm", "lightning-fabric", "jsonargparse", "torchmetrics", "scikit-learn", "pillow", "matplotlib", "jinja2")


def report() -> Iterator[str]:
    """Lines: versions, the native libraries, and for each op which backend is chosen on each device and why not the
    others."""
    yield f"debiaskd {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    yield f"platform: {platform.platform()}"
    yield f"CPU: {torch.get_num_threads()} threads; vector instructions: {torch.backends.cpu.get_cpu_capability()}"
    yield from (f"device: {line}" for line in _accelerators())
    yield ""
    yield f"native libraries (in {backend.library_directory()}):"
    record = backend.build_record()
    if record:
        yield f"  built with torch {record['torch']} on Python {record['python']}"
    for library, name in (("schema", "schema"), ("cpu", "cpp"), ("cuda", "cuda")):
        built = record.get(library, {}).get("compiler", "")
        yield f"  {library:7} {backend.unavailable.get(name) or f'loaded; {built}'}"
    yield ""
    asked = backend.requested()
    source = " (DEBIASKD_BACKEND)" if os.environ.get("DEBIASKD_BACKEND") else ""
    yield f"backend asked for: {asked or 'none, so that each op takes the first that runs'}{source if asked else ''}"
    for device in _devices():
        yield f"ops on {device}:"
        for op, order in backend.IMPLEMENTATIONS.items():
            yield f"  {op:16} {_chosen(op, device)}"
            for name in (n for n in backend.BACKENDS if n != "eager"):
                reason = backend.why_not(op, name, device)
                yield f"    {name:14} {reason or f'runs; place {order.index(name) + 1} of {len(order)}'}"
    yield ""
    yield "extra `train`: " + ", ".join(_versions(EXTRAS))


def environment() -> dict[str, Any]:
    """What a result file says about where it was made."""
    return {
        "debiaskd": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "devices": list(_accelerators()),
        "backends": {op: _chosen(op, "cpu") for op in backend.IMPLEMENTATIONS},
    }


def _chosen(op: str, device: str) -> str:
    try:
        return backend.choose(op, torch.empty(0, device=device))
    except backend.BackendError as error:
        return f"none: {error}"


def _devices() -> list[str]:
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.xpu.is_available():
        found.append("xpu")
    return found


def _accelerators() -> Iterator[str]:
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(i)
            memory = f"{found.total_memory / 2**30:.0f} GiB"
            yield f"cuda:{i} {found.name}, {memory}, compute capability {found.major}.{found.minor}"


def _versions(names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name} MISSING"


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in report())
