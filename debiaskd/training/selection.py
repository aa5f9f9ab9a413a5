"""Keep the best checkpoints by validation metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from debiaskd.models.registry import save_weights
from debiaskd.training.pareto import ParetoFront
from debiaskd.utils import files

#: The validation metrics that a rule compares, each a fraction; larger is better.
RULES: dict[str, tuple[str, ...]] = {
    "worst_group": ("worst_group_accuracy",),
    "worst_environment": ("worst_environment_accuracy",),
    "accuracy": ("accuracy",),
    "f1": ("f1",),
    "pareto": ("f1", "epg", "iou"),
    "last": (),
}


class CheckpointSelector:
    """Keep the weights of the best epochs as `kept/epoch-0007.safetensors`.

    Of equals, a rule of one metric keeps the later, as does `last`; a Pareto front of several keeps all that no other
    beats, and puts the one with the highest sum in front.

    Args:
        folder: of the stage.
        rule: see `RULES`.
        names: of the metrics; None: the rule's own.
        about: is written into the files.
    """

    def __init__(self, folder: Path, rule: str, names: tuple[str, ...] | None, about: dict[str, Any]) -> None:
        self.folder, self.rule, self.about = folder / "kept", rule, about
        self.names = RULES[rule] if names is None else names
        self.front = ParetoFront(self.names) if len(self.names) > 1 else None
        self.best: int | None = None
        #: The last epoch that was better than all before it, and not only as good.
        self.improved: int | None = None
        self.figures: dict[str, dict[str, float]] = {}

    def path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:04d}.safetensors"

    @property
    def selected(self) -> list[int]:
        if self.front is not None:
            return [candidate.epoch for candidate in self.front]
        return [] if self.best is None else [self.best]

    def update(
        self, epoch: int, figures: Mapping[str, float], model: nn.Module, last: bool, *, write: bool = True
    ) -> None:
        """Consider one more epoch; `last`: the training ends with it.

        Raises:
            OSError: the weights cannot be written.
        """
        values = {name: figures[name] for name in self.names}
        self.figures[str(epoch)] = dict(figures)
        if self.front is not None:
            # A metric without a single image to be measured on is no better than any.
            change = self.front.add({name: value if value == value else 0.0 for name, value in values.items()}, epoch)
            entered = change.entered
            if entered:
                self.improved = epoch
            self.best = max(self.front, key=lambda candidate: (sum(candidate.values), candidate.epoch)).epoch
        else:
            old = None if self.best is None else self.figures[str(self.best)]
            entered = (not self.names and last) or (bool(self.names) and (old is None or self._beats(values, old)))
            if self.names and (old is None or self._improves(values, old)):
                self.improved = epoch
            if entered:
                self.best = epoch
        if entered and write:
            self.folder.mkdir(parents=True, exist_ok=True)
            about = {**self.about, "epoch": epoch}
            files.write(self.path(epoch), lambda unfinished: save_weights(model, unfinished, about))

    def _beats(self, values: Mapping[str, float], old: Mapping[str, float]) -> bool:
        (name,) = self.names
        return not values[name] < old[name]

    def _improves(self, values: Mapping[str, float], old: Mapping[str, float]) -> bool:
        """Better, and not only as good; a number is better than none."""
        (name,) = self.names
        return values[name] > old[name] or (old[name] != old[name] and values[name] == values[name])

    def waited(self, settled: int = 0) -> int:
        """Epochs from the last improvement to the last that was considered.

        Args:
            settled: the first epoch that can be compared with later ones; epochs before it do not count.
        """
        if self.improved is None or not self.figures:
            return 0
        return max(0, max(map(int, self.figures)) - max(self.improved, settled - 1))

    def prune(self, *, write: bool = True) -> None:
        """Delete weights that are no longer selected; call it after the checkpoint that records the selection."""
        if write and self.folder.is_dir():
            wanted = {self.path(epoch) for epoch in self.selected}
            for path in self.folder.iterdir():
                if path not in wanted:
                    path.unlink()

    def state_dict(self) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "chosen": self.best,
            "improved": self.improved,
            "figures": self.figures,
            "front": None if self.front is None else self.front.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.figures = state["chosen"], state["figures"]
        self.improved = state.get("improved", self.best)  # earlier versions did not write it
        if self.front is not None:
            self.front.load_state_dict(state["front"])


def against_worst_group(selector: CheckpointSelector, rule: str) -> dict[str, Any]:
    """What a rule without annotation lost: {"against_worst_group": facts}, empty where groups are not known.

    The facts are on validation: `epoch`, which the worst known group would have chosen, its `worst_group_accuracy`,
    that of the epoch that was `chosen`, and their difference, `lost`.
    """
    if rule != "worst_environment" or selector.best is None:
        return {}
    known = {int(epoch): found.get("worst_group_accuracy") for epoch, found in selector.figures.items()}
    measured = {epoch: value for epoch, value in known.items() if value is not None}
    if len(measured) < len(known):
        return {}
    best = max(measured, key=lambda epoch: (measured[epoch], epoch))
    facts = {"epoch": best, "worst_group_accuracy": measured[best], "chosen": measured[selector.best]}
    return {"against_worst_group": {**facts, "lost": measured[best] - measured[selector.best]}}
