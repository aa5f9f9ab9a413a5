"""What torchmetrics' base class leaves to its metrics: results that are never those of an earlier state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Mergeable(Metric):
    """A `torchmetrics.Metric` whose `compute()` is of the state that it has.

    torchmetrics keeps what `compute()` gave until the next `update`: after `merge_state`, `load_state_dict` or
    `sync` it would be what it was before them. And `merge_state` adds up whatever has a shape that broadcasts, also
    metrics with other settings.
    """

    def settings(self) -> dict[str, Any]:
        """What two metrics must have in common for their states to be added."""
        return {}

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric of the same settings has seen, or its `metric_state`.

        Raises:
            ValueError: the other is of another class, of other settings, or has states of other shapes.
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
