"""A run: the stages of a recipe, each in its own folder.

    RUN/recipe.yaml             the recipe, with every default
    RUN/begun.yaml              the recipe at the start; fingerprints are computed from it
    RUN/teacher/                a teacher that is trained here
    RUN/identification/         a briefly trained model; the images that it gets wrong are weighted up
    RUN/weights/                the samples' weights
    RUN/pretraining/            the student on the labels alone
    RUN/student/                the student: model.safetensors

A finished stage has a `stage.json` with its inputs and outputs, and a `seconds.json` with its duration. When the run is
started again, finished stages with the same inputs are reused and an interrupted stage is resumed; other inputs raise
an error that asks for another folder. All stages except the student's can be shared with other runs
(`debiaskd.training.shared_stages`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from debiaskd.data.packed import manifest
from debiaskd.data.packed.shards import PLAN
from debiaskd.recipe import Recipe, RecipeError, to_dict
from debiaskd.training import resume, shared_stages
from debiaskd.training.shared_stages import SharedStages
from debiaskd.training.stage import SECONDS, finished_of, is_of
from debiaskd.training.stage import STAGE as STAGE
from debiaskd.training.stage import RunError as RunError
from debiaskd.training.stage import Stage as Stage
from debiaskd.training.stage import digest as digest
from debiaskd.training.stage import first_difference as first_difference
from debiaskd.utils import files
from debiaskd.version import __version__

LOCK = ".lock"
FORMAT = 1

#: (stage, fraction of it that is done, a message or "").
ProgressCallback = Callable[[str, float, str], None]


class Run:
    """The folder of a run.

    Args:
        folder: created if it does not exist.
        recipe: a checked recipe.
        write: whether this process writes. It locks the folder until `release`, or until it ends.
        shared: shares all stages except the student's with other runs; None: no stage is shared.

    Raises:
        RunError: the folder is not that of a run, belongs to another recipe, or is locked by another process.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, write: bool = True, shared: SharedStages | None = None) -> None:
        self.folder, self.recipe, self.write, self.shared = folder, recipe, write, shared
        self._lock: files.Lock | None = None
        if write:
            if _strangers(folder) and not (folder / "recipe.yaml").exists():
                raise RunError(f"{folder}: is neither empty nor a run's folder; choose another --out")
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _alone(folder)
        before, now = resume.read(folder), to_dict(recipe)
        #: The recipe that the run was started with; fingerprints are computed from it.
        self.document = now if before is None else resume.align_recipe(before, now)
        if not write:
            return
        if before is not None:
            difference = first_difference(decisive(before), decisive(self.document))
            if difference is not None:
                key, old, new = difference
                raise RunError(f"{folder}: was begun with {key}: {old}, not {new}; choose another --out")
        if before is not None:  # first, because it is what is lost with the recipe of an earlier version
            resume.write(folder / "begun.yaml", before, again=False)
        resume.write(folder / "recipe.yaml", now)
        resume.write(folder / "begun.yaml", now, again=False)

    def release(self) -> None:
        """Unlock the folder for other processes."""
        if self._lock is not None:
            self._lock.release()

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        make: Callable[[Path, str], dict[str, Any]],
        *,
        older: Mapping[str, Any] | None = None,
    ) -> Stage:
        """Return a finished stage, and run it first if needed.

        Args:
            name: name of the stage and of its folder.
            inputs: everything that determines the outputs, as JSON.
            make: function of (folder, fingerprint of the inputs) that writes the stage's files and returns its facts.
            older: inputs of the same stage in an earlier version; a stage that was finished with them is reused.

        Raises:
            RunError: the folder contains a stage of other inputs, or a damaged one.
        """
        folder, fingerprint = self.folder / name, digest({"format": FORMAT, **inputs})
        known = {fingerprint, *([] if older is None else [digest({"format": FORMAT, **older})])}
        found = finished_of(folder, inputs, known)
        if found is not None:
            return found
        shared = self.shared
        if shared is None or name == "student" or shared.broadcast(shared_stages.begun(folder)):
            return self._make(folder, inputs, fingerprint, make)
        there = (place for place in shared.of_name(name) if is_of(place, inputs, known))
        place = shared.broadcast(next(there, shared.place(name, fingerprint)))
        with shared.locked(place):
            found = finished_of(place, inputs, known) or self._make(place, inputs, fingerprint, make)
            shared.link(place, folder)
        return Stage(folder, found.fingerprint, found.inputs, found.facts, found.outputs)

    def _make(
        self,
        folder: Path,
        inputs: Mapping[str, Any],
        fingerprint: str,
        make: Callable[[Path, str], dict[str, Any]],
    ) -> Stage:
        if self.write:
            folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        facts = make(folder, fingerprint)
        seconds = round(time.perf_counter() - started, 3)
        if self.write:
            made = sorted([*folder.glob("*.safetensors"), *folder.glob("kept/*.safetensors")])
            outputs = {str(path.relative_to(folder)): files.sha256(path) for path in made}
            document = {
                "made_by": f"debiaskd {__version__}",
                "fingerprint": fingerprint,
                "inputs": dict(inputs),
                "outputs": outputs,
                "facts": facts,
            }
            files.write_json(folder / SECONDS, {"seconds": seconds})  # apart: it is another every time
            files.write_json(folder / STAGE, document)
        return Stage(folder, fingerprint, dict(inputs), facts, {})


def _strangers(folder: Path) -> set[str]:
    """Names of files in a folder, except hidden ones and those that `debiaskd.train` writes before a run: packed
    data sets and the weights of modules."""
    if not folder.exists():
        return set()
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if (folder / "data" / PLAN).is_file():
        found.discard("data")
    if all(path.suffix == ".safetensors" for path in (folder / "given").glob("*")):
        found.discard("given")
    return found


def _alone(folder: Path) -> files.Lock:
    try:
        return files.Lock(folder / LOCK)
    except BlockingIOError:
        raise RunError(f"{folder}: another process is training here; wait for it, or choose another --out") from None


def open_run(folder: Path) -> Recipe:
    """Read the recipe of a run.

    Raises:
        RunError: the folder is not that of a run.
    """
    from debiaskd.recipe import read

    if not (folder / "recipe.yaml").is_file():
        raise RunError(f"{folder}: is no run's folder, it has no recipe.yaml")
    try:
        return read(folder / "recipe.yaml", resolve=False)
    except RecipeError as error:
        raise RunError(str(error)) from None


def finished(folder: Path, stage: str) -> Stage:
    """Return a finished stage of a run.

    Raises:
        RunError: no stage has this name, or it is unfinished or damaged.
    """
    found = Stage.read(folder / stage)
    if found is None:
        there = sorted(path.parent.name for path in folder.glob(f"*/{STAGE}"))
        raise RunError(f"{folder}: stage {stage!r} is not finished; finished: {', '.join(there) or 'none'}")
    found.verify()
    return found


def data_fingerprint(path: str) -> str:
    """Fingerprint of a prepared data set; it changes with every pixel and every box.

    Raises:
        DataError: the data set is not prepared.
    """
    document = manifest.read(Path(path))
    return digest({key: document[key] for key in ("classes", "groups", "options", "splits")})


def decisive(document: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recipe that influences the result, without the location of the data."""
    found = dict(document)
    if "compute" in document:
        chosen = ("precision", "compile", "sync_batchnorm")
        found["compute"] = {key: value for key, value in document["compute"].items() if key in chosen}
    found["data"] = {key: value for key, value in document["data"].items() if key not in ("path", "url", "test")}
    return found


def as_yaml(recipe: Recipe) -> str:
    return resume.as_yaml(to_dict(recipe))
