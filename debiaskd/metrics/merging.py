"""A torchmetrics base class whose results are never those of an earlier state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Mergeable(Metric):
    """A `torchmetrics.Metric` whose `compute()` always uses the current state.

    torchmetrics caches the result of `compute()` until the next `update`, so that it is stale after `merge_state`,
    `load_state_dict` or `sync`. Its `merge_state` also adds states of metrics with other settings if their shapes
    broadcast.
    """

    def settings(self) -> dict[str, Any]:
        """The settings that two metrics must share for their states to be added."""
        return {}

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the state of another metric with the same settings, or its `metric_state`.

        Raises:
            ValueError: the other metric has another class, other settings, or states of other shapes.
        """
        if isinstance(incoming_state, Mergeable) and isinstance(incoming_state, type(self)):
            other = incoming_state.settings()
            for name, own in self.settings().items():
                if other[name] != own:
                    raise ValueError(f"incoming_state must be of {name}={own}, as this metric, got {other[name]}")
        state = incoming_state.metric_state if isinstance(incoming_state, Metric) else incoming_state
        for name, default in self._defaults.items():
            found = state.get(name) if isinstance(state, dict) else None  # else torchmetrics refuses it
            if isinstance(default, Tensor) and isinstance(found, Tensor) and found.shape != default.shape:
                raise ValueError(
                    f"incoming_state[{name!r}] must have shape {list(default.shape)}, got {list(found.shape)}"
                )
        super().merge_state(incoming_state)
        self._computed = None
        self._update_count += incoming_state.update_count if isinstance(incoming_state, Metric) else 1

    def sync(self, *args: Any, **kwargs: Any) -> None:
        super().sync(*args, **kwargs)
        self._computed = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._computed = None
        for name, default in self._defaults.items():
            if isinstance(default, Tensor):  # which is added to in place, and belongs to the caller
                setattr(self, name, torch.clone(getattr(self, name)))
