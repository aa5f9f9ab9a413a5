"""A finished stage of a run: its files, and the `stage.json` that says what they were made from.

stage.json      fingerprint and inputs, checksums of the outputs, facts; written last
seconds.json    how long the process took that finished it, which differs from time to time
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from debiaskd.training import resume
from debiaskd.utils import files

STAGE, SECONDS = "stage.json", "seconds.json"


class RunError(ValueError):
    """A run's folder is not what it has to be."""


class Stage:
    """A finished stage.

    Attributes:
        folder, fingerprint, inputs: see `Run.stage`.
        facts: which epoch was kept by which rule, its metrics on validation, and the like.
        outputs: names of files and their SHA-256.
    """

    def __init__(
        self, folder: Path, fingerprint: str, inputs: dict[str, Any], facts: dict[str, Any], outputs: dict[str, str]
    ) -> None:
        self.folder, self.fingerprint, self.inputs = folder, fingerprint, inputs
        self.facts, self.outputs = facts, outputs

    @property
    def model(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def seconds(self) -> float | None:
        """How long the process took that finished it; None where that was not written."""
        found = files.read_json(self.folder / SECONDS)
        return None if found is None else float(found["seconds"])

    @classmethod
    def read(cls, folder: Path) -> Stage | None:
        """None if there is none, or an unfinished one."""
        try:
            document = files.read_json(folder / STAGE)
            if document is None:
                return None
            return cls(folder, *(document[key] for key in ("fingerprint", "inputs", "facts", "outputs")))
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{folder / STAGE}: damaged; remove {folder} and train again") from None

    def verify(self) -> None:
        """Raises RunError if a file is not what was written."""
        for name, expected in self.outputs.items():
            path = self.folder / name
            if not path.is_file() or files.sha256(path) != expected:
                raise RunError(f"{path}: missing or damaged; remove {self.folder} and train again")


def is_of(folder: Path, inputs: Mapping[str, Any], known: set[str]) -> bool:
    """Whether a folder holds the finished stage of these inputs."""
    try:
        found = Stage.read(folder)
    except RunError:  # damaged: said where it is the stage that is needed
        return False
    return found is not None and _same(found, inputs, known)


def _same(found: Stage, inputs: Mapping[str, Any], known: set[str]) -> bool:
    return found.fingerprint in known or resume.same_inputs(found.inputs, json.loads(json.dumps(inputs)))


def finished_of(folder: Path, inputs: Mapping[str, Any], known: set[str]) -> Stage | None:
    """The finished stage of these inputs, verified; None if the folder holds none.

    Raises:
        RunError: the folder holds the stage of other inputs, or a damaged one.
    """
    found = Stage.read(folder)
    if found is None:
        return None
    if not _same(found, inputs, known):
        changed = first_difference(found.inputs, json.loads(json.dumps(inputs)))
        what = "other inputs" if changed is None else f"{changed[0]}: {changed[1]}, not {changed[2]}"
        raise RunError(f"{folder}: was made with {what}; choose another --out")
    found.verify()
    return found


def first_difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """(key, old, new) of the first of them."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in {**before, **now}:
            found = first_difference(before.get(name), now.get(name), f"{key}.{name}" if key else str(name))
            if found is not None:
                return found
        return None
    return None if before == now else (key, before, now)


def digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
