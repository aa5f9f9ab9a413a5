"""Read one array of a prepared data set."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from debiaskd.data.sources.records import DataError


def load(file: Path, *, mapped: bool = False) -> NDArray[Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array: NDArray[Any] = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
            return array
    except (ValueError, EOFError, FileNotFoundError) as error:
        raise DataError(f"{file}: missing or damaged ({' '.join(str(error).split())})") from None
