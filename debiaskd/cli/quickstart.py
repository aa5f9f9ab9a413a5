"""`debiaskd quickstart`: train the recipes of recipes/quickstart on images with a known shortcut, and compare them.

    OUT/data/digits-0/     the images of seed 0
    OUT/stages/            what runs share: each seed's teacher is trained once
    OUT/runs/dett-0/       a run, as `debiaskd train` makes one
    OUT/results.json       the rows of the table
    OUT/report.html        the page

Runs on the CPU, in several worker processes of one thread each. The same seeds give the same metrics bit for bit, with
any number of workers, and a method's do not depend on which others run. Started again in the same folder, finished runs
are used again.
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
from debiaskd.utils import checks, files
from debiaskd.utils.workers import Job, cores, run_jobs

#: Methods and their recipes, in the order of the table.
RECIPES: Mapping[str, str] = {
    method: f"quickstart/{method}" for method in ("erm", "kd", "simkd", "dett", "guided", "cid", "dett+guided+cid")
}
TEACHER = "teacher"
#: Images of each split, their side, and the share of the training images whose photograph agrees with the label.
PICTURES: Mapping[str, Any] = {"train": 5000, "val": 1000, "test": 2000, "size": 48, "agreement": 0.95}
SELECTION = (
    "For the teacher and every student: the epoch with the best worst-group accuracy on the validation images, whose "
    "groups are known, and the later of equals. Test images decide nothing."
)
#: Relative cost of each stage, so that the progress shown moves evenly; in the order of a run.
COSTS = {"data": 0.5, TEACHER: 9.0, "identification": 0.8, "teacher-cache": 0.7, "student": 6.0, "measuring": 1.0}
#: Share of a stage between two of its messages to the process that shows the progress.
NEWS = 0.01


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
    workers: int | None = None,
) -> Results:
    """Train everything, measure it on the test images, and write `out/report.html` and `out/results.json`.

    Both files are written at the end; whatever stops the job before leaves earlier ones alone.

    Args:
        out: directory, made if it does not exist.
        seeds: how many (0, 1, …), or which. Each draws its own images and trains its own teacher.
        recipes: by method, the name or the path of a recipe. Their teachers are the same: the table has one row of it.
        images: options of `debiaskd prepare digits`.
        progress: see `Progress`.
        workers: number of processes that train; 1: this one does. None: one for each core, and no more than
            there are runs. A script that calls this needs no `if __name__ == "__main__"`.

    Raises:
        OSError: `out` cannot be written. Tried before anything is trained.
        ValueError: no seed, or one twice; no recipe.
        RecipeError, RunError, DataError: as of `debiaskd train`.
        ModuleNotFoundError: a package of the train extra is not installed. Tried likewise.
        WorkerError: a worker process was killed.
    """
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds must be at least one, each once, got {seeds!r}")
    if not recipes:
        raise ValueError("recipes must be at least one, got none")
    if workers is not None and checks.integer("workers", workers) < 1:
        raise ValueError(f"workers must be >= 1, got {workers}")
    _require()
    out = Path(out)
    for name in ("report.html", "results.json"):
        files.probe(out / name)
    started = perf_counter()
    found = {method: read(path) for method, path in recipes.items()}
    reused = sum((_folder(out, method, seed) / "student" / STAGE).is_file() for method in recipes for seed in chosen)
    jobs = _jobs(out, chosen, recipes, found, pictures)
    clock = _Clock(jobs, found, progress)
    workers = min(workers or cores(), len(chosen) * len(recipes))
    made = run_jobs(jobs, workers, begun=clock.begin, news=clock.advance, ended=clock.end)
    methods = [*([TEACHER] if _taught(found) else []), *recipes]
    rows = [made[method, seed].row for seed in chosen for method in methods]
    shown = {method: made[method, chosen[0]].measured for method in methods}
    environment = {
        **doctor.environment(),
        "threads": 1,
        "workers": workers,
        "seconds": round(perf_counter() - started, 1),
        "reused_runs": reused,
    }
    described = {method: description(path) for method, path in recipes.items()}
    results = Results(rows, environment, _settings(found, described, chosen, pictures), shown)
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
    if _taught(recipes):
        described = {TEACHER: description("quickstart/_taught"), **described}
    return {
        "seeds": seeds,
        "pictures": dict(pictures),
        "selection": SELECTION,
        "methods": described,
        "recipes": found,
    }


def _taught(recipes: Mapping[str, Recipe]) -> list[str]:
    """The methods that have a teacher."""
    return [method for method, recipe in recipes.items() if recipe.teacher is not None]


def _folder(out: Path, method: str, seed: int) -> Path:
    return out / "runs" / f"{method}-{seed}"


# -- jobs of the workers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """The result of a run: its row of results.json, and what the report shows of it."""

    row: dict[str, Any]
    measured: Measured


def _jobs(
    out: Path,
    seeds: Sequence[int],
    recipes: Mapping[str, str | Path],
    found: Mapping[str, Recipe],
    pictures: Mapping[str, Any],
) -> list[Job]:
    """Data of all seeds, then their teachers, then runs: while a teacher is trained, other workers train another seed's
    or runs that need none."""
    taught = _taught(found)
    jobs = [Job(("data", seed), _prepare, (_data(out, seed), seed, dict(pictures))) for seed in seeds]
    if taught:
        first = taught[0]
        jobs += [Job((TEACHER, s), _train, (out, TEACHER, s, first, recipes[first]), ("data", s)) for s in seeds]
    for seed in seeds:
        for method, path in recipes.items():
            after = (TEACHER if method in taught else "data", seed)
            jobs.append(Job((method, seed), _train, (out, method, seed, method, path), after))
    return jobs


def _data(out: Path, seed: int) -> Path:
    return out / "data" / f"digits-{seed}"


def _prepare(folder: Path, seed: int, pictures: dict[str, Any], tell: Callable[[Any], None]) -> None:
    prepare("digits", None, folder, seed=seed, progress=lambda split, done: tell(("data", done)), **pictures)


def _train(out: Path, name: str, seed: int, method: str, path: str | Path, tell: Callable[[Any], None]) -> _Made:
    """Train and measure a run, or with the name of the teacher only that of the run."""
    from debiaskd.pipeline.stages import Pipeline
    from debiaskd.training.fabric import launch

    options = ("--data.path", str(_data(out, seed)), "--seed", str(seed), "--compute.stages", str(out / "stages"))
    recipe, folder, told = read(path, options), _folder(out, method, seed), ("", 0.0)

    def say(stage: str, share: float, news: str) -> None:
        nonlocal told
        if stage != told[0] or share >= min(told[1] + NEWS, 1.0):
            told = (stage, share)
            tell(told)

    pipeline = Pipeline(recipe, folder, launch(recipe.compute), say)
    if name == TEACHER:
        pipeline.teacher_alone()
    else:
        pipeline.student()
    say("measuring", 0.0, "")
    stage, before = (TEACHER, ()) if name == TEACHER else ("student", ("identification",))
    # The threshold of the IoU, which nothing here reads, is fixed: choosing it takes attributions of validation images.
    measured = measure(folder, name, stage=stage, threshold=0.5)
    stages = [Stage.read(folder / part) for part in (*before, stage)]
    seconds = sum(one.seconds or 0.0 for one in stages if one is not None)
    return _Made(report.row(name, measured, round(seconds, 3)), measured)


class _Clock:
    """The progress of all jobs together. What is shown as being done is the job that began last."""

    def __init__(self, jobs: Sequence[Job], recipes: Mapping[str, Recipe], progress: Progress | None) -> None:
        self.progress, self.task, self.shown = progress, "", 0.0
        self.costs = {job.key: _costs(job.key[0], recipes.get(job.key[0])) for job in jobs}
        self.total = sum(sum(costs.values()) for costs in self.costs.values())
        self.done = dict.fromkeys(self.costs, 0.0)

    def begin(self, key: tuple[str, int]) -> None:
        name, seed = key
        self.task = f"seed {seed}: {name}"
        self._show()

    def advance(self, key: tuple[str, int], news: tuple[str, float]) -> None:
        """A job's news: (stage, share of it that is done)."""
        (stage, share), costs = news, self.costs[key]
        if stage in costs:
            stages = list(costs)
            self.done[key] = sum(costs[name] for name in stages[: stages.index(stage)]) + costs[stage] * share
            self._show()

    def end(self, key: tuple[str, int]) -> None:
        self.done[key] = sum(self.costs[key].values())
        self._show()

    def _show(self) -> None:
        self.shown = max(self.shown, min(sum(self.done.values()) / self.total, 1.0))
        if self.progress is not None:
            self.progress(self.task, self.shown)


def _costs(name: str, recipe: Recipe | None) -> dict[str, float]:
    """Cost of each stage of a job."""
    if name == "data":
        return {"data": COSTS["data"]}
    if recipe is None:
        return {stage: COSTS[stage] for stage in (TEACHER, "measuring")}
    there = {
        "identification": recipe.weights is not None,
        "teacher-cache": recipe.teacher is not None,
        "student": True,
        "measuring": True,
    }
    return {stage: COSTS[stage] for stage, needed in there.items() if needed}
