"""`debiaskd quickstart`: train the recipes of recipes/quickstart on images with a known shortcut, and compare them.

    OUT/data/digits-0/     the images of seed 0
    OUT/stages/            what runs share: each seed's teacher is trained once
    OUT/runs/dett-0/       a run, as `debiaskd train` makes one
    OUT/results.json       the rows of the table
    OUT/report.html        the page

Runs on the CPU. The same seeds and number of threads give the same metrics bit for bit, and a method's do not depend on
which others run. Started again in the same folder, finished runs are used again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from debiaskd.cli import doctor
from debiaskd.data import prepare
from debiaskd.recipe import Recipe, read, to_dict
from debiaskd.recipe.sources import description
from debiaskd.reports import quickstart as report
from debiaskd.reports.measured import Measured, measure
from debiaskd.training.run import STAGE, Stage
from debiaskd.utils import files

#: Methods and their recipes, in the order of the table.
RECIPES: Mapping[str, str] = {
    method: f"quickstart/{method}" for method in ("erm", "kd", "simkd", "dett", "guided", "cid", "dett+guided+cid")
}
TEACHER = "teacher"
#: Images of each split, their side, and the share of the training images whose photograph agrees with the label.
PICTURES: Mapping[str, Any] = {"train": 5000, "val": 1000, "test": 2000, "size": 48, "agreement": 0.95}
SELECTION = (
    "For the teacher and every student: the epoch with the best worst-group accuracy on the validation pictures, whose "
    "groups are known, and the later of equals. Test pictures decide nothing."
)
#: What the stages cost beside each other, so that the progress shown moves evenly; in the order of a run.
COSTS = {"identification": 0.8, TEACHER: 9.0, "teacher-cache": 0.7, "student": 6.0, "measuring": 1.0}


class Progress(Protocol):
    """Called with what is being done ("seed 0: dett") and the share of the whole job that is over, rising from 0 to 1.

    An exception that it raises stops the job.
    """

    def __call__(self, task: str, done: float, /) -> None: ...


@dataclass(frozen=True)
class Results:
    """What the quickstart gives.

    Attributes:
        rows, environment, settings: the content of results.json.
        runs: the measured runs of the first seed, by method.
    """

    rows: list[dict[str, Any]]
    environment: dict[str, Any]
    settings: dict[str, Any]
    runs: dict[str, Measured]

    def document(self) -> dict[str, Any]:
        return {"rows": self.rows, "environment": self.environment, "settings": self.settings}


def run(
    out: Path | str,
    seeds: int | Sequence[int] = 3,
    *,
    recipes: Mapping[str, str | Path] = RECIPES,
    pictures: Mapping[str, Any] = PICTURES,
    progress: Progress | None = None,
) -> Results:
    """Train everything, measure it on the test images, and write `out/report.html` and `out/results.json`.

    Both files are written at the end; whatever stops the job before leaves earlier ones alone.

    Args:
        out: directory, made if it does not exist.
        seeds: how many (0, 1, …), or which. Each draws its own images and trains its own teacher.
        recipes: by method, the name or the path of a recipe. Their teachers are the same: the table has one row of it.
        pictures: options of `debiaskd prepare digits`.
        progress: see `Progress`.

    Raises:
        OSError: `out` cannot be written. Tried before anything is trained.
        ValueError: no seed, or one twice; no recipe.
        RecipeError, RunError, DataError: as of `debiaskd train`.
        ModuleNotFoundError: a package of the train extra is not installed. Tried likewise.
    """
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds must be at least one, each once, got {seeds!r}")
    if not recipes:
        raise ValueError("recipes must be at least one, got none")
    _require()
    out = Path(out)
    for name in ("report.html", "results.json"):
        files.probe(out / name)
    started = perf_counter()
    found = {method: read(path) for method, path in recipes.items()}
    clock = _Clock(found, len(chosen), progress)
    rows: list[dict[str, Any]] = []
    shown: list[dict[str, Measured]] = []
    reused = 0
    for seed in chosen:
        job = _Seed(out, seed, clock)
        reused += job.train(recipes, pictures)
        shown.append(job.measured)
        rows.extend(job.rows)
    environment = {**doctor.environment(), "seconds": round(perf_counter() - started, 1), "reused_runs": reused}
    described = {method: description(path) for method, path in recipes.items()}
    results = Results(rows, environment, _settings(found, described, chosen, pictures), shown[0])
    files.write_text(out / "report.html", report.render(results.document(), results.runs))
    files.write_json(out / "results.json", results.document())
    return results


def _require() -> None:
    """Import what is needed at the end, so that a missing package is known before anything is trained."""
    import jinja2
    import PIL
    import sklearn

    _ = jinja2, PIL, sklearn


def _settings(
    recipes: Mapping[str, Recipe], described: dict[str, str], seeds: list[int], pictures: Mapping[str, Any]
) -> dict[str, Any]:
    found = {}
    for method, recipe in recipes.items():
        found[method] = to_dict(recipe)
        del found[method]["seed"], found[method]["data"]["path"], found[method]["compute"]["stages"]
    if any(recipe.teacher is not None for recipe in recipes.values()):
        described = {TEACHER: description("quickstart/_taught"), **described}
    return {
        "seeds": seeds,
        "pictures": dict(pictures),
        "selection": SELECTION,
        "methods": described,
        "recipes": found,
    }


class _Seed:
    """The runs of one seed.

    Attributes:
        measured: by method, in the order of the table.
        rows: of results.json.
    """

    def __init__(self, out: Path, seed: int, clock: _Clock) -> None:
        self.out, self.seed, self.clock = out, seed, clock
        self.measured: dict[str, Measured] = {}
        self.rows: list[dict[str, Any]] = []

    def train(self, recipes: Mapping[str, str | Path], pictures: Mapping[str, Any]) -> int:
        """Train and measure them; returns how many runs were finished before."""
        from debiaskd.pipeline.stages import Pipeline
        from debiaskd.training.fabric import launch

        data = self.out / "data" / f"digits-{self.seed}"
        prepare("digits", None, data, seed=self.seed, **pictures)
        here = ("--data.path", str(data), "--seed", str(self.seed), "--compute.stages", str(self.out / "stages"))
        reused = 0
        for method, path in recipes.items():
            recipe = read(path, here)
            folder = self.out / "runs" / f"{method}-{self.seed}"
            reused += (folder / "student" / STAGE).is_file()
            say = self.clock.run(f"seed {self.seed}: ", method, recipe, taught=TEACHER in self.measured)
            Pipeline(recipe, folder, launch(recipe.compute), say).student()
            say("measuring", 0.0, "")
            if recipe.teacher is not None and TEACHER not in self.measured:
                self._measure(TEACHER, folder, TEACHER, ())
            self._measure(method, folder, "student", ("identification",))
            say("measuring", 1.0, "")
        if TEACHER in self.measured:  # first in the table
            self.measured = {TEACHER: self.measured.pop(TEACHER), **self.measured}
            self.rows.sort(key=lambda row: row["method"] != TEACHER)
        return reused

    def _measure(self, method: str, folder: Path, stage: str, before: tuple[str, ...]) -> None:
        # A fixed threshold of the IoU, which nothing here reads: to choose it takes attributions of validation.
        found = measure(folder, method, stage=stage, threshold=0.5)
        stages = [Stage.read(folder / name) for name in (*before, stage)]
        seconds = sum(one.seconds or 0.0 for one in stages if one is not None)
        self.measured[method] = found
        self.rows.append(report.row(method, found, round(seconds, 3)))


class _Clock:
    """Counts the cost of what is over and tells the progress."""

    def __init__(self, recipes: Mapping[str, Recipe], seeds: int, progress: Progress | None) -> None:
        self.progress, self.done, self.shown = progress, 0.0, 0.0
        taught, one = False, 0.0
        for recipe in recipes.values():
            one += sum(_costs(recipe, taught=taught).values())
            taught = taught or recipe.teacher is not None
        self.total = seeds * one

    def run(self, prefix: str, method: str, recipe: Recipe, *, taught: bool) -> Callable[[str, float, str], None]:
        """The progress of one run, by its stages; the run's cost is over when it is asked for the next one."""
        costs, before = _costs(recipe, taught=taught), self.done
        self.done += sum(costs.values())

        def say(stage: str, share: float, news: str) -> None:
            stages = list(costs)
            if stage not in costs:
                return
            done = before + sum(costs[name] for name in stages[: stages.index(stage)]) + costs[stage] * share
            self.shown = max(self.shown, min(done / self.total, 1.0))
            if self.progress is not None:
                self.progress(prefix + (TEACHER if stage == TEACHER else method), self.shown)

        return say


def _costs(recipe: Recipe, *, taught: bool) -> dict[str, float]:
    """Of the stages that a run has; `taught` says that its seed's teacher is trained already."""
    there = {
        "identification": recipe.weights is not None,
        TEACHER: recipe.teacher is not None and not taught,
        "teacher-cache": recipe.teacher is not None,
        "student": True,
        "measuring": True,
    }
    return {stage: COSTS[stage] for stage, needed in there.items() if needed}
