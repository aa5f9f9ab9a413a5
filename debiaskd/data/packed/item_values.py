"""Values of a user's data set as arrays, and the error for what is something else than described."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class Wrong(Exception):  # noqa: N818
    """An item is something else than described; the text says what was expected and what came."""


def array_of(value: Any, what: str) -> Any:
    """A numpy array of an array, a tensor, a PIL image or a sequence.

    Raises:
        Wrong: it is none of them; `what` names it.
    """
    try:
        return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    except (ValueError, TypeError) as error:
        raise Wrong(f"{what} must be numbers ({error})") from None
