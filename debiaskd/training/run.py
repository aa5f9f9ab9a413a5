"""A run: the chain of stages that a recipe asks for, each in a folder of its own.

    RUN/recipe.yaml             what is asked for, with every default
    RUN/begun.yaml              what it was begun with, of which fingerprints are made
    RUN/teacher/                a teacher that is trained here
    RUN/identification/         a brief training, whose mistakes are to weigh more
    RUN/weights/                the samples' weights
    RUN/pretraining/            the student on the labels alone
    RUN/student/                the student: model.safetensors

A stage ends with `stage.json`, which says what went in and what came out. Run again, a finished stage is reused as
long as what goes in is the same; one that was interrupted goes on; for other inputs another folder is asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from debiaskd.data.packed import manifest
from debiaskd.data.packed.shards import PLAN
from debiaskd.recipe import Recipe, RecipeError, to_dict
from debiaskd.training import resume
from debiaskd.utils import files
from debiaskd.version import __version__

STAGE, LOCK = "stage.json", ".lock"
FORMAT = 1

#: (what is being done, share of it that is over, a line of news or "").
ProgressCallback = Callable[[str, float, str], None]


class RunError(ValueError):
    """A run's folder is not what it has to be."""


class Run:
    """A run's folder.

    Args:
        folder: made if it does not exist.
        recipe: as checked.
        write: whether this process is the one that writes. It alone may, until `release` or its end.

    Raises:
        RunError: not a run's folder, another recipe's, or one that another process trains in.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, write: bool = True) -> None:
        self.folder, self.recipe, self.write = folder, recipe, write
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
            _write_yaml(folder / "begun.yaml", before, again=False)
        _write_yaml(folder / "recipe.yaml", now)
        _write_yaml(folder / "begun.yaml", now, again=False)

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
        found = Stage.read(folder)
        known = {fingerprint, *([] if older is None else [digest({"format": FORMAT, **older})])}
        same = found is not None and resume.same_inputs(found.inputs, json.loads(json.dumps(inputs)))
        if found is not None and (same or found.fingerprint in known):
            found.verify()
            return found
        if found is not None:
            changed = first_difference(found.inputs, json.loads(json.dumps(inputs)))
            what = "other inputs" if changed is None else f"{changed[0]}: {changed[1]}, not {changed[2]}"
            raise RunError(f"{folder}: was made with {what}; choose another --out")
        if self.write:
            folder.mkdir(parents=True, exist_ok=True)
        facts = make(folder, fingerprint)
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


class Stage:
    """A finished stage.

    Attributes:
        folder, fingerprint, inputs: see `Run.stage`.
        facts: which epoch was kept by which rule, its figures on validation, and the like.
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


def as_yaml(recipe: Recipe) -> str:
    return _yaml(to_dict(recipe))


def _yaml(document: Mapping[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(document, sort_keys=False)
    return text


def _write_yaml(path: Path, document: Mapping[str, Any], *, again: bool = True) -> None:
    """Unless it is there: as it would be, or, without `again`, at all."""
    text = _yaml(document)
    if not path.exists() or (again and path.read_text(encoding="utf-8") != text):
        files.write_text(path, text)
