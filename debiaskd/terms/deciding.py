"""Terms on attribution maps: what their attributor has decided of a model is part of a checkpoint."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from debiaskd.attribution.attributor import Attributor
from debiaskd.terms.state import Term, TermOptions


class DecidingTerm(Term):
    """A term with an attributor.

    Args:
        options: of the term.
        attributor: of the student.
    """

    def __init__(self, options: TermOptions, attributor: Attributor) -> None:
        super().__init__(options)
        self.attributor = attributor

    def get_extra_state(self) -> Tensor:
        """What the attributor has decided is part of a checkpoint: JSON, as a tensor like all else in a state dict."""
        return torch.tensor(list(json.dumps(self.attributor.state_dict()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.attributor.load_state_dict(json.loads(bytes(state.tolist())))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Older checkpoints hold no decision: it is made again.
        state_dict.setdefault(f"{prefix}_extra_state", DecidingTerm.get_extra_state(self))
        super()._load_from_state_dict(state_dict, prefix, *rest)
