"""Train and pack from Python; `train` does what `debiaskd train` does and writes the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import nn

from debiaskd.api.finished import Run
from debiaskd.models.own import give

if TYPE_CHECKING:
    from debiaskd.data import Prepared
    from debiaskd.recipe import Recipe

#: In a run's folder: weights of modules and packed data sets that were given to `train`.
GIVEN_WEIGHTS, GIVEN_DATA = "given", "data"
_SPLITS = ("train", "val", "test")


@overload
def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    data: Path | str | Sequence[Any] | None = None,
    teacher: str | nn.Module | None = None,
    student: str | nn.Module | None = None,
    out: Path | str | None = None,
    only: None = None,
    progress: bool = True,
    **overrides: Any,
) -> Run: ...


@overload
def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    data: Path | str | Sequence[Any] | None = None,
    teacher: str | nn.Module | None = None,
    student: str | nn.Module | None = None,
    out: Path | str | None = None,
    only: Literal["teacher"],
    progress: bool = True,
    **overrides: Any,
) -> Path: ...


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    data: Path | str | Sequence[Any] | None = None,
    teacher: str | nn.Module | None = None,
    student: str | nn.Module | None = None,
    out: Path | str | None = None,
    only: Literal["teacher"] | None = None,
    progress: bool = True,
    **overrides: Any,
) -> Run | Path:
    """Train the student that a recipe describes, as `debiaskd train` does; finished stages are reused.

    Args:
        recipe: the name of one that comes with debiaskd, a YAML file, a dict of the same keys, or a `Recipe`.
        data: a prepared folder; or data sets (train, validation[, test]), which are packed below `out` (see `pack`).
        teacher: a name, or a module that is used as it is: images [N,3,H,W] to logits [N,K].
        student: a name, or a module that training begins from.
        out: folder of the run; None: runs/ and the recipe's name.
        only: "teacher": train the recipe's teacher and nothing after it; without it, training continues from there.
        progress: show what is being done.
        **overrides: keys of the recipe: `seed=1`, `schedule={"epochs": 5}`, `**{"schedule.epochs": 5}`.

    Returns:
        The run; with `only`, the file of the teacher's weights.

    Raises:
        RecipeError, RunError, DataError, NetworkError: before anything is trained.
        DivergedError, CheckpointError, OSError: as their names say.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> import debiaskd as dk
        >>> sets = [[(torch.rand(3, 16, 16), i % 2) for i in range(n)] for n in (8, 4)]
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = dk.train(
        ...         {"terms": {"supervised": {}}, "schedule": {"epochs": 1, "batch": 4}},
        ...         data=sets, student=net, out=folder, progress=False,
        ...     )
        ...     sorted(run.metrics)[:1], run.student(torch.zeros(1, 3, 16, 16)).shape
        (['accuracy'], torch.Size([1, 2]))
    """
    from debiaskd.pipeline.stages import Pipeline
    from debiaskd.pipeline.teachers import trained_options
    from debiaskd.recipe import RecipeError, read
    from debiaskd.training.fabric import launch

    if only not in (None, "teacher"):
        raise ValueError(f'only must be None or "teacher", got {only!r}')
    folder = _folder(recipe) if out is None else Path(out)
    values = dict(overrides)
    sets = None if data is None or isinstance(data, (str, Path)) else _sets(data)
    if sets is None and data is not None:
        values["data.path"] = str(data)
    if sets is not None:
        values["data.path"] = str(folder / GIVEN_DATA)
        values |= {"data.train": "train", "data.validation": "val", "data.test": "test"}
    modules = {"student": student, "teacher": teacher}
    for key, network in modules.items():
        if isinstance(network, nn.Module):
            values |= _given(key, network, folder)
        elif isinstance(network, str):
            values[f"{key}.name"] = network
        elif network is not None:
            raise TypeError(f"{key} must be a name or an nn.Module, got {type(network).__name__}")
    made = read(recipe, values)
    if made.compute.nodes * made.compute.devices > 1 and any(isinstance(one, nn.Module) for one in modules.values()):
        raise RecipeError("compute.devices: modules that are given from Python train on one device; name a callable")
    if only is not None:
        trained_options(made)
    fabric = launch(made.compute)
    if fabric.is_global_zero:
        for key, network in modules.items():
            if isinstance(network, nn.Module):
                _keep(key, network, folder)
        for dataset, split in zip(sets or (), _SPLITS):
            pack(dataset, folder / GIVEN_DATA, split=split, progress=progress)
    fabric.barrier()
    with _shown(progress and fabric.is_global_zero) as say:
        pipeline = Pipeline(made, folder, fabric, say)
        stage = pipeline.student() if only is None else pipeline.teacher_alone()
    if only is not None:
        return stage.model
    given = {key: network for key, network in modules.items() if isinstance(network, nn.Module)}
    return Run(folder, **given)


def pack(
    dataset: Any,
    out: Path | str,
    *,
    split: str,
    classes: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> Prepared:
    """Write any map-style data set as prepared data. See `debiaskd.data.packed.pack.pack` for items and options.

    Args:
        dataset: a `torch.utils.data.Dataset`, a Hugging Face data set, a list: items are (image, target), or mappings
            with image, target and optionally boxes, box_labels, group.
        out: folder; further splits are packed into the same one.
        split: its name, such as "train".
        classes, groups: names; None: the data set's own, or numbers.
        progress: show what is being done.
        **options: size, fit, workers, strict, shard_size.

    Returns:
        The manifest, and what was skipped.

    Raises:
        DataError, OSError, TypeError, ValueError: see there.
    """
    from debiaskd.data.packed.pack import pack as write

    with _shown(progress) as say:

        def tell(name: str, done: float) -> None:
            say(f"packing {name}", done, "")

        return write(dataset, out, split=split, classes=classes, groups=groups, progress=tell, **options)


def _folder(recipe: Any) -> Path:
    name = Path(recipe).stem if isinstance(recipe, (str, Path)) else "recipe"
    return Path("runs") / name


def _sets(data: Any) -> list[Any]:
    if not isinstance(data, (tuple, list)) or not 2 <= len(data) <= 3:
        count = f" of {len(data)}" if isinstance(data, (tuple, list)) else ""
        raise TypeError(
            "data must be a prepared folder, or (train, validation[, test]) data sets, "
            f"got {type(data).__name__}{count}"
        )
    return list(data)


def _given(key: str, module: nn.Module, folder: Path) -> dict[str, Any]:
    """What the recipe says of a module that was given, instead of what it said of the network before."""
    found: dict[str, Any] = {"name": give(module), "pretrained": False, "weights": str(_weights(key, folder))}
    found["options"] = None
    if key == "teacher":
        found |= {"method": "checkpoint", "schedule": None, "up": None, "identification_epochs": None}
        found |= {"step_size": None, "validation_share": None}
    return {f"{key}.{name}": value for name, value in found.items()}


def _weights(key: str, folder: Path) -> Path:
    return folder / GIVEN_WEIGHTS / f"{key}.safetensors"


def _keep(key: str, module: nn.Module, folder: Path) -> None:
    """Write the weights of a module that was given: they are part of what the run is made of.

    Raises:
        RunError: the run was begun with other weights.
    """
    from debiaskd.models.registry import save_weights
    from debiaskd.training.run import RunError
    from debiaskd.utils import files

    path = _weights(key, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    other = path.with_suffix(".new")
    files.write(other, lambda unfinished: save_weights(module, unfinished, {}))
    same = path.exists() and files.sha256(path) == files.sha256(other)
    if path.exists() and not same:
        other.unlink()
        raise RunError(f"{folder}: was begun with other weights of the {key}; choose another out")
    other.replace(path)


@contextmanager
def _shown(progress: bool) -> Iterator[Any]:
    if not progress:
        yield lambda task, done, news="": None
        return
    from rich.console import Console

    from debiaskd.utils.progress import shown

    with shown(Console(stderr=True)) as say:
        yield say
