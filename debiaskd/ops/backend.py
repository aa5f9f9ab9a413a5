"""Which implementation of an op runs, and why.

Four backends: `eager` (plain PyTorch, every device), `cpp` (C++, CPU), `cuda` (CUDA C++) and `triton` (any Triton
device). Left alone, each op takes the fastest that runs where its tensors lie. `with backend("eager"):` or the
environment variable `DEBIASKD_BACKEND` choose instead; what was asked for and cannot run raises and says why.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("eager", "cpp", "cuda", "triton")
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
#: Which backends implement each op, fastest first. A new implementation is announced here.
IMPLEMENTATIONS = {
    "feature_match": ("cpp", "eager"),
    "localization": ("cpp", "eager"),
    "channel_dot": ("cpp", "eager"),
    "class_relation": ("cpp", "eager"),
    "backdoor": ("cpp", "eager"),
}
_DEVICES = {"cpp": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "xpu")}
_PACKAGE = Path(__file__).resolve().parent.parent


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here."""


class _Requested(threading.local):
    name: str | None = None
    outer: tuple[Any, ...] = ()  # (name, outer) of the surrounding context


_requested = _Requested()


class backend:  # noqa: N801 - reads as a statement: `with backend("eager"):`
    """Context manager: every op inside, in this thread, runs on the named backend. None restores automatic choice.

    Raises:
        ValueError: no such backend.
        BackendError: raised by the op itself, where the backend cannot run it.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            _check_name("backend", name)
        self.name = name

    def __enter__(self) -> backend:
        _requested.outer = (_requested.name, _requested.outer)
        _requested.name = self.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _requested.name, _requested.outer = _requested.outer


def requested() -> str | None:
    """The backend that the caller asked for, or None where the choice is ours."""
    if _requested.name is not None:
        return _requested.name
    name = os.environ.get("DEBIASKD_BACKEND") or None
    if name is not None:
        _check_name("DEBIASKD_BACKEND", name)
    return name


def choose(op: str, tensor: Tensor) -> str:
    """The backend that runs `op` on this tensor's device."""
    device = tensor.device.type
    name = requested()
    if name is not None:
        reason = why_not(op, name, device)
        if reason is not None:
            raise BackendError(f"backend {name!r} was asked for but cannot run {op} on {device}: {reason}")
        return name
    for candidate in IMPLEMENTATIONS[op]:
        if why_not(op, candidate, device) is None:
            return candidate
    return "eager"


def why_not(op: str, name: str, device: str) -> str | None:
    """Why backend `name` cannot run `op` on a device type; None if it can."""
    if name == "eager":
        return None
    if name not in IMPLEMENTATIONS[op]:
        return f"{op} has no {name} implementation"
    if device not in _DEVICES[name]:
        return f"it runs on {' and '.join(_DEVICES[name])} tensors"
    return unavailable.get(name)


def _check_name(argument: str, name: object) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


# ---- the native libraries: each loaded on its own, each allowed to be missing ----


def library_directory() -> Path:
    """Where the native libraries are looked for: beside the package, or in `DEBIASKD_LIBRARY_DIR`."""
    return Path(os.environ.get("DEBIASKD_LIBRARY_DIR") or _PACKAGE)


def build_record() -> dict[str, Any]:
    """What the build wrote about itself: compilers, torch, and why a library was left out."""
    path = library_directory() / "build_record.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record


def _load(name: str, record: dict[str, Any]) -> str | None:
    """Loads one library; returns why it could not be, or None."""
    path = library_directory() / f"libdebiaskd_{name}.so"
    if not path.exists():
        reason: str = record.get(name, {}).get("skipped", f"{path.name} was not built; reinstall with a compiler")
        return reason
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} did not load: {error.__cause__ or error}"
    unknown = [op for op in IMPLEMENTATIONS if name == "schema" and not hasattr(torch.ops.debiaskd, op)]
    if unknown:
        return f"{path.name} is older than this code and does not know {', '.join(unknown)}; reinstall to build it anew"
    return None


def _load_all() -> dict[str, str]:
    record = build_record()
    schema = _load("schema", record)
    reasons = {"schema": schema} if schema else {}
    for name, library in (("cpp", "cpu"), ("cuda", "cuda")):
        reason = schema or _load(library, record)
        if reason:
            reasons[name] = reason
    if "cpp" in reasons:
        warnings.warn(f"debiaskd: no native CPU ops ({reasons['cpp']}); every op runs on eager", stacklevel=2)
    return reasons


#: Backend -> why it cannot run anywhere on this machine. Filled once, at import.
unavailable: dict[str, str] = _load_all()
native = "schema" not in unavailable
