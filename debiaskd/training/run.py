"""A run: the chain of stages that a recipe asks for, each in a folder of its own.

    RUN/recipe.yaml             what is asked for, with every default
    RUN/begun.yaml              what it was begun with, of which fingerprints are made
    RUN/teacher/                a teacher that is trained here
    RUN/identification/         a brief training, whose mistakes are to weigh more
    RUN/weights/                the samples' weights
    RUN/pretraining/            the student on the labels alone
    RUN/student/                the student: model.safetensors

A stage ends with `stage.json`, which says what went in and what came out; `seconds.json` says how long it took. Run
again, a finished stage is reused as long as what goes in is the same; one that was interrupted goes on; for other
inputs another folder is asked for.
All stages but the student's can be shared with other runs (`debiaskd.training.shared_stages`).
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

#: (what is being done, share of it that is over, a line of news or "").
ProgressCallback = Callable[[str, float, str], None]


class Run:
    """A run's folder.

    Args:
        folder: made if it does not exist.
        recipe: as checked.
        write: whether this process is the one that writes. It alone may, until `release` or its end.
        shared: where stages but the student's are shared with other runs; None: they are the run's own.

    Raises:
        RunError: not a run's folder, another recipe's, or one that another process trains in.
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
        #: What the run was begun with, of which fingerprints are made.
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
        """Let other processes train here."""
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
        """The finished stage: as it was found, or made now.

        Args:
            name: of its folder.
            inputs: everything that decides what comes out; JSON.
            make: (folder, fingerprint of the inputs) to facts; leaves its files in the folder.
            older: the inputs that an earlier version gave to the same stage; a finished one of these is used, too.

        Raises:
            RunError: the folder holds the stage of other inputs, or a damaged one.
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
    """What lies in a folder and is neither hidden nor what `debiaskd.train` puts there before a run begins: packed data
    sets, and weights of modules that it was given."""
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
    """The recipe of a run.

    Raises:
        RunError: it is none.
    """
    from debiaskd.recipe import read

    if not (folder / "recipe.yaml").is_file():
        raise RunError(f"{folder}: is no run's folder, it has no recipe.yaml")
    try:
        return read(folder / "recipe.yaml", resolve=False)
    except RecipeError as error:
        raise RunError(str(error)) from None


def finished(folder: Path, stage: str) -> Stage:
    """A finished stage of a run.

    Raises:
        RunError: there is none of the name, or it is not finished, or damaged.
    """
    found = Stage.read(folder / stage)
    if found is None:
        there = sorted(path.parent.name for path in folder.glob(f"*/{STAGE}"))
        raise RunError(f"{folder}: stage {stage!r} is not finished; finished: {', '.join(there) or 'none'}")
    found.verify()
    return found


def data_fingerprint(path: str) -> str:
    """Of the prepared pictures: changes with every pixel and every box.

    Raises:
        DataError: not prepared.
    """
    document = manifest.read(Path(path))
    return digest({key: document[key] for key in ("classes", "groups", "options", "splits")})


def decisive(document: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what has no influence on the outcome, and without where the data lies."""
    found = dict(document)
    if "compute" in document:
        chosen = ("precision", "compile", "sync_batchnorm")
        found["compute"] = {key: value for key, value in document["compute"].items() if key in chosen}
    found["data"] = {key: value for key, value in document["data"].items() if key not in ("path", "url", "test")}
    return found


def as_yaml(recipe: Recipe) -> str:
    return resume.as_yaml(to_dict(recipe))
