"""Tune a recipe and write what was found: what `debiaskd tune` and `dk.tune` do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from debiaskd.pipeline import tuning
from debiaskd.recipe import Recipe, read
from debiaskd.recipe.sweep import check_over, settings
from debiaskd.reports import tuning as report
from debiaskd.training.fabric import launch
from debiaskd.training.run import LOCK, RunError
from debiaskd.utils import files

PAGE, RESULTS, BEST = "tune.html", "results.json", "best.yaml"


@dataclass(frozen=True)
class Tuned:
    """What `tune` found.

    Attributes:
        folder: with the trials, tune.html, results.json and best.yaml.
        best: the chosen values by key; None: no combination could be compared.
        lines: the table, as the command prints it.
    """

    folder: Path
    best: Mapping[str, Any] | None
    lines: tuple[str, ...] = ()

    @property
    def recipe(self) -> Path:
        """The recipe with the chosen values, which `train` takes."""
        return self.folder / BEST

    @property
    def page(self) -> Path:
        return self.folder / PAGE

    @property
    def results(self) -> dict[str, Any]:
        """What results.json holds: every trial, and the mean and standard deviation of every combination."""
        found: dict[str, Any] = json.loads((self.folder / RESULTS).read_text(encoding="utf-8"))
        return found


def tune(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    over: Mapping[str, Sequence[Any]],
    *,
    random: int | None = None,
    seeds: int = 1,
    data: Path | str | None = None,
    out: Path | str | None = None,
    progress: bool = True,
    **overrides: Any,
) -> Tuned:
    """Train a recipe with every combination of some values and choose one on validation, as `debiaskd tune` does.

    Args:
        recipe: as for `train`.
        over: values by key, such as {"weights.up": [1, 5, 20]}.
        random: so many of the combinations, drawn at random, the same ones every time; None: all.
        seeds: trainings of each combination.
        data: a prepared folder; None: the recipe's.
        out: folder; None: runs/tune- and the recipe's name. Trials that it holds are reused.
        progress: show what is being done.
        **overrides: keys of the recipe, for all trials.

    Returns:
        The chosen values, and where everything lies. Trials that failed are in `results`.

    Raises:
        RecipeError, RunError, DataError, NetworkError: before anything is trained.
        OSError: files cannot be written.

    Example:
        >>> import debiaskd as dk
        >>> found = dk.tune("waterbirds_dett", {"weights.up": [5, 50]}, data="birds-224", seeds=3)  # doctest: +SKIP
        >>> found.best, dk.train(found.recipe, data="birds-224")  # doctest: +SKIP
        ({'weights.up': 5}, Run('runs/best', ...))
    """
    from rich.console import Console

    from debiaskd.utils.progress import shown

    for name, value in (("random", random), ("seeds", seeds)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    values = dict(overrides) if data is None else {**overrides, "data.path": str(data)}
    base = read(recipe, values)
    name = str(recipe) if isinstance(recipe, (str, Path)) else "recipe"
    folder = Path("runs") / f"tune-{Path(name).stem}" if out is None else Path(out)
    return sweep(
        name,
        base,
        check_over(over),
        folder,
        draw=random,
        seeds=seeds,
        progress=(lambda: shown(Console(stderr=True))) if progress else silence,
    )


def sweep(
    name: str,
    base: Recipe,
    over: Mapping[str, Sequence[Any]],
    out: Path,
    *,
    draw: int | None,
    seeds: int,
    progress: Callable[[], Any],
) -> Tuned:
    """Train the trials and write page, results and chosen recipe.

    Args:
        name: of the recipe.
        base: the recipe.
        over: values by key, checked.
        out: folder.
        draw: so many combinations; None: all.
        seeds: trainings of each.
        progress: a context manager whose value is called with what is being done.

    Returns:
        What was found; without lines on ranks other than the first.

    Raises:
        RecipeError, RunError, DataError, NetworkError, CheckpointError, OSError: in one line each.
    """
    found = tuning.trials(base, settings(over, draw=draw), seeds, out)
    fabric = launch(base.compute)
    first, outcomes = fabric.is_global_zero, []
    criterion = tuning.check(found, fabric)
    with _alone(out, write=first), progress() if first else silence() as say:
        for number, trial in enumerate(found, 1):

            def tell(task: str, done: float, news: str = "", name: str = f"{number} of {len(found)}") -> None:
                say(f"trial {name}, {task}", done, news)

            tell(str(trial), 0.0)
            outcomes.append(tuning.run(trial, fabric, tell))
            if outcomes[-1].error is not None:
                tell("failed", 1.0, f"{trial}: {outcomes[-1].error}")
            if first:
                best = tuning.chosen(outcomes, criterion)
                files.write_json(out / RESULTS, report.document(name, over, outcomes, criterion, best))
    best = tuning.chosen(outcomes, criterion)
    values = None if best is None else dict(best.values)
    if not first:
        return Tuned(out, values)
    rows = report.rows(outcomes, criterion)
    printed, yaml = report.lines(rows, criterion, best), ""
    if best is not None:
        score = next(row.score for row in rows if row.setting.slug == best.slug)
        assert score is not None
        about = f"{best}: {criterion} {score.text(1)} % on validation, the best of {len(rows)} combinations"
        tuning.write_best(out / BEST, base, best, about)
        yaml = (out / BEST).read_text(encoding="utf-8")
        printed.append(str(out / BEST))
    report.write_page(out / PAGE, name, over, rows, criterion, best, yaml)
    return Tuned(out, values, (*printed, str(out / RESULTS), str(out / PAGE)))


@contextmanager
def _alone(folder: Path, *, write: bool) -> Iterator[None]:
    """Nobody else tunes in this folder meanwhile.

    Raises:
        RunError: somebody does.
    """
    lock = None
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = files.Lock(folder / LOCK)
        except BlockingIOError:
            raise RunError(f"{folder}: another process tunes here; wait for it, or choose another --out") from None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@contextmanager
def silence() -> Iterator[Callable[..., None]]:
    """Progress that is shown nowhere."""
    yield lambda task, done, news="": None
