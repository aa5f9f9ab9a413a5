"""Read pickles of plain values and uint8 arrays without executing code from them.

A pickle can call any function of any module. Here only the three numpy functions of an array are allowed, and even
these are not called: a placeholder records their arguments, and the array is made from these afterwards if it is of
bytes.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from debiaskd.data.sources.records import DataError

_ARRAYS = (
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
)


class _Remembered:
    """A call, and the state that was set afterwards."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, where only arrays are allowed")
        return _Remembered


def load(file: Path) -> dict[str, Any]:
    """The dictionary in `file`, for `array` and `text`. Strings of Python 2 are bytes, but for its keys.

    Raises:
        DataError: it is no pickle, holds no dictionary, or asks for anything but arrays.
        OSError: it cannot be read.
    """
    with open(file, "rb") as content:
        try:
            made = _Unpickler(content, encoding="bytes").load()
        except OSError:
            raise
        except Exception as error:  # whatever a damaged or hostile file makes it stumble over
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{file}: refused as a pickle: {reason}") from None
    if not isinstance(made, dict):
        raise DataError(f"{file}: must hold a dictionary, got {type(made).__name__}")
    return {text(key): value for key, value in made.items()}


def text(value: Any) -> str:
    """A string of either Python; "" for anything else."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value if isinstance(value, str) else ""


def array(value: Any) -> NDArray[np.uint8] | None:
    """The array that `value` stands for; None if it stands for none, or for one that is not of uint8."""
    if not isinstance(value, _Remembered) or not isinstance(value.state, tuple) or len(value.state) != 5:
        return None
    _, shape, dtype, by_columns, content = value.state
    if not isinstance(dtype, _Remembered) or not dtype.arguments or text(dtype.arguments[0]) not in ("u1", "|u1"):
        return None
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
        return None
    if not isinstance(content, bytes) or math.prod(shape) != len(content):
        return None
    return np.frombuffer(content, np.uint8).reshape(shape, order="F" if by_columns else "C")
