"""Save and load checkpoints: atomic, verified by checksum, loaded without executing code; the last two are kept.

checkpoints/0000001200.pt      everything that training changes
checkpoints/0000001200.json    its length and SHA-256, written afterwards: with it, the checkpoint is one
"""

from __future__ import annotations

import pickle
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from debiaskd.models.weight_reading import one_line
from debiaskd.utils import files

KEPT = 2


class CheckpointWarning(UserWarning):
    """A checkpoint is damaged; training resumes from an older one."""


class CheckpointError(ValueError):
    """None of the checkpoints can be used."""


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        folder: created with the first checkpoint.
        identity: fingerprint of the training; a checkpoint of another training is refused.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Save the state after `step` steps and delete all but the last two checkpoints.

        Raises:
            OSError: the checkpoint cannot be written; earlier ones are unchanged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{step:010d}.pt"
        document = {"identity": self.identity, "step": step, "state": state}
        files.write(path, lambda unfinished: _save(document, unfinished))
        facts = {"step": step, "bytes": path.stat().st_size, "sha256": files.sha256(path)}
        files.write_json(path.with_suffix(".json"), facts)
        for old in self._written()[:-KEPT]:
            old.with_suffix(".json").unlink(missing_ok=True)  # first: without it the checkpoint does not count
            old.unlink(missing_ok=True)

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Load (step, state) of the newest valid checkpoint; None if there is no checkpoint.

        Warns:
            CheckpointWarning: a newer checkpoint is damaged.

        Raises:
            CheckpointError: all checkpoints are damaged, or belong to another training.
        """
        reasons = []
        for path in reversed(self._written()):
            try:
                found = self._open(path)
            except _DamagedError as damage:
                reasons.append(f"{path}: {damage}")
                continue
            for reason in reasons:
                warnings.warn(f"{reason}; going on from step {found[0]}", CheckpointWarning, stacklevel=2)
            return found
        if reasons:
            raise CheckpointError("; ".join(reasons))
        return None

    def clear(self) -> None:
        """Delete all checkpoints."""
        for path in self.folder.glob("*"):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _written(self) -> list[Path]:
        """Paths, oldest first; without its .json a checkpoint is incomplete."""
        return sorted(path for path in self.folder.glob("*.pt") if path.with_suffix(".json").exists())

    def _open(self, path: Path) -> tuple[int, dict[str, Any]]:
        try:
            facts = files.read_json(path.with_suffix(".json"))
            if path.stat().st_size != facts["bytes"] or files.sha256(path) != facts["sha256"]:
                raise _DamagedError("damaged, it is not what was written")
            document = torch.load(path, map_location="cpu", weights_only=True)
            identity, step, state = document["identity"], document["step"], document["state"]
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, _DamagedError):
                raise
            raise _DamagedError(f"damaged ({one_line(error)[:200]})") from None
        if identity != self.identity:
            raise CheckpointError(f"{path}: of another training; choose another --out")
        return step, state


class _DamagedError(ValueError):
    pass


def _save(document: dict[str, Any], path: Path) -> None:
    try:
        torch.save(document, path)
    except RuntimeError as error:  # what torch makes of a full disk
        with suppress(OSError), open(path, "ab") as file:  # a plain write raises the actual error
            file.write(b"\0" * (1 << 20))
            file.flush()
        raise OSError(28, f"cannot be written ({one_line(error)[:100]})", str(path)) from None
