"""Which implementation of an op runs, and why.

Four backends: `eager` (plain PyTorch, every device), `cpp` (C++, CPU), `cuda` (CUDA C++) and `triton` (any Triton
device). Left alone, each op takes the fastest that runs where its tensors lie. `with backend("eager"):` or the
environment variable `DEBIASKD_BACKEND` choose instead; what was asked for and cannot run raises and says why. Programs
that `torch.export` and `torch.onnx.export` make hold `eager`, unless another is chosen: they run without this package.
Under `torch.func`'s transforms (`grad`, `vmap`, `jvp`, `jacrev`, …) and in forward mode, which kernels know nothing of,
every op is `eager`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from debiaskd.utils import checks

BACKENDS = ("eager", "cpp", "cuda", "triton")
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
REDUCTION_NAMES = tuple(REDUCTIONS)
#: Which backends implement each op, fastest first. A new implementation is announced here.
IMPLEMENTATIONS = {
    "feature_match": ("cpp", "cuda", "triton", "eager"),
    "localization": ("cpp", "cuda", "triton", "eager"),
    "box_overlap": ("cpp", "eager"),
    "map_cosine": ("cpp", "triton", "eager"),
    "channel_dot": ("cpp", "cuda", "triton", "eager"),
    "class_relation": ("cpp", "triton", "eager"),
    "backdoor": ("cpp", "cuda", "triton", "eager"),
}
#: Where in `torch.ops` a backend's kernels are found: the same names and schemas everywhere.
NAMESPACES = {"cpp": "debiaskd", "cuda": "debiaskd", "triton": "debiaskd_triton"}
#: Whether Triton's kernels run in its interpreter, on CPU tensors: for tests. Triton reads this when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
_DEVICES = {"cpp": ("cpu",), "cuda": ("cuda",), "triton": ("cpu",) if INTERPRETED else ("cuda", "xpu")}
_ENVIRONMENT = getattr(os.environ, "_data", None)
_KEY = os.fsencode("DEBIASKD_BACKEND")
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


def _asked_in_environment() -> str | None:
    """DEBIASKD_BACKEND. Asked at every call, and mostly not set, for which `os.environ.get` raises and catches a
    KeyError: a microsecond that a look at the dictionary behind it does not take."""
    if _ENVIRONMENT is not None and _KEY not in _ENVIRONMENT:
        return None
    return os.environ.get("DEBIASKD_BACKEND")


def requested() -> str | None:
    """The backend that the caller asked for, or None where the choice is ours."""
    if _requested.name is not None:
        return _requested.name
    name = _asked_in_environment() or None
    if name is not None:
        _check_name("DEBIASKD_BACKEND", name)
    return name


def choose(op: str, tensor: Tensor) -> str:
    """The backend that runs `op` on this tensor's device."""
    device = tensor.device.type
    name = requested()
    if checks.transformed():
        return _transformable(op, name)
    if name is not None:
        if name not in IMPLEMENTATIONS[op]:
            return "eager"  # without kernels of its own there, the op is a composition of PyTorch's
        reason = why_not(op, name, device)
        if reason is not None:
            raise BackendError(f"backend {name!r} was asked for but cannot run {op} on {device}: {reason}")
        return name
    if torch.compiler.is_exporting():
        return "eager"
    for candidate in IMPLEMENTATIONS[op]:
        # Interpreted, a kernel is there to be tested and has to be asked for.
        if why_not(op, candidate, device) is None and not (candidate == "triton" and INTERPRETED):
            return candidate
    return "eager"


def _transformable(op: str, name: str | None) -> str:
    if name not in (None, "eager") and name in IMPLEMENTATIONS[op]:
        raise BackendError(
            f"backend {name!r} was asked for but cannot run {op} under torch.func's transforms (grad, vmap, jvp, ...) "
            "and in forward mode, which only the eager backend can do: ask for that, or for none"
        )
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


def kernels(name: str) -> Any:
    """The namespace of `torch.ops` that holds the kernels of a backend other than eager."""
    return getattr(torch.ops, NAMESPACES[name])


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
        return f"{path.name} is older than this code and does not know {', '.join(unknown)}; reinstall to rebuild it"
    return None


def _load_triton() -> str | None:
    """Imports the Triton kernels where they could run; returns why they cannot, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    # Counting devices starts no CUDA context, which a process that forks later could not use.
    if not (INTERPRETED or torch.cuda.device_count() or (torch.xpu._is_compiled() and torch.xpu.device_count())):
        return "it needs a GPU, or TRITON_INTERPRET=1 for its interpreter on the CPU"
    try:
        importlib.import_module("debiaskd.kernels.library")
    except Exception as error:
        return f"the Triton kernels could not be imported: {error}"
    return None


def triton_version() -> tuple[int, int]:
    major, minor = importlib.import_module("triton").__version__.split(".")[:2]
    return int(major), int(minor)


def _load_all() -> dict[str, str]:
    record = build_record()
    schema = _load("schema", record)
    reasons = {"schema": schema} if schema else {}
    for name, library in (("cpp", "cpu"), ("cuda", "cuda")):
        reason = schema or _load(library, record)
        if reason:
            reasons[name] = reason
    triton = _load_triton()
    if triton:
        reasons["triton"] = triton
    if "cpp" in reasons:
        warnings.warn(f"debiaskd: no native CPU ops ({reasons['cpp']}); every op runs on eager", stacklevel=2)
    return reasons


#: Backend -> why it cannot run anywhere on this machine. Filled once, at import.
unavailable: dict[str, str] = _load_all()
native = "schema" not in unavailable

# ---- shapes without values, for torch.compile ----

_Function = TypeVar("_Function", bound=Callable[..., Any])
#: Op -> what its results look like.
FAKES: dict[str, Callable[..., Any]] = {}


def _takes(op: str) -> list[str]:
    """The names of an op's arguments, as the native schema has them."""
    schema = getattr(torch.ops.debiaskd, op).default._schema
    return [argument.name for argument in schema.arguments]


def _refuse_libraries(reason: str) -> None:
    """Libraries of another version than this code would fail at the first call."""
    if "cpp" not in unavailable:
        warnings.warn(f"debiaskd: no native ops ({reason}); every op runs on eager or triton", stacklevel=4)
    unavailable.update(cpp=reason, cuda=reason)


def register_fake(op: str) -> Callable[[_Function], _Function]:
    """Says, for every backend that is here, what the results of the decorated op's kernels look like."""

    def decorate(function: _Function) -> _Function:
        FAKES[op] = function
        for name in sorted(set(NAMESPACES.values())):
            if not hasattr(getattr(torch.ops, name), op):
                continue
            if name == NAMESPACES["cpp"] and _takes(op) != list(inspect.signature(function).parameters):
                _refuse_libraries(f"they are older than this code and know another {op}; reinstall to rebuild them")
                continue
            torch.library.register_fake(f"{name}::{op}", function)
        return function

    return decorate
