"""Train a recipe with several values of its keys, and compare them on validation; `test` is not read.

    DIR/trials/weights.up=5-seed0/     a run each, as `debiaskd train` makes it
    DIR/stages/                        the stages that trials share
    DIR/results.json                   all trials, and what was chosen
    DIR/best.yaml                      the recipe that was chosen

A trial that is finished is not trained again, one that was interrupted is continued, one that failed is tried again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from debiaskd.data import DataError
from debiaskd.models.registry import NetworkError
from debiaskd.pipeline.stages import Pipeline
from debiaskd.pipeline.teachers import student_selection
from debiaskd.recipe import Recipe, RecipeError, read, to_dict
from debiaskd.recipe.sweep import Setting
from debiaskd.training.checkpoint import CheckpointError
from debiaskd.training.divergence import DivergedError
from debiaskd.training.run import (
    STAGE,
    ProgressCallback,
    RunError,
    Stage,
    data_fingerprint,
    decisive,
    finished,
    first_difference,
    open_run,
)
from debiaskd.training.selection_rule import rule_metrics
from debiaskd.utils import files

#: What a trial can fail by on every process alike.
TOGETHER = (RecipeError, RunError, DataError, NetworkError, CheckpointError, DivergedError)


@dataclass(frozen=True)
class Trial:
    """One training of a setting.

    Attributes:
        setting, seed: what it differs from others in.
        recipe: as checked.
        folder: of its run.
    """

    setting: Setting
    seed: int
    recipe: Recipe
    folder: Path

    def __str__(self) -> str:
        return f"{self.setting}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        trial: which.
        facts: of the student's stage, with its metrics on validation; None: it failed.
        seconds: that the student took, without shared stages.
        error: why it failed.
    """

    trial: Trial
    facts: Mapping[str, Any] | None
    seconds: float | None = None
    error: str | None = None

    @property
    def metrics(self) -> dict[str, float | None]:
        return {} if self.facts is None else dict(self.facts["figures"])


@dataclass(frozen=True)
class Criterion:
    """What trials are compared by.

    Attributes:
        rule: of the recipe, or its default.
        names: of the validation metrics that the rule compares; of several, their sum.
    """

    rule: str
    names: tuple[str, ...]

    def __call__(self, outcome: Outcome) -> float | None:
        """Larger is better; None where the trial failed, or a metric is undefined."""
        values = [outcome.metrics.get(name) for name in self.names]
        return None if None in values else sum(value for value in values if value is not None)

    def __str__(self) -> str:
        return self.names[0] if len(self.names) == 1 else f"the sum of {', '.join(self.names)}"


def trials(base: Recipe, settings: Sequence[Setting], seeds: int, out: Path) -> list[Trial]:
    """The trials of a sweep, seed by seed within each setting.

    Args:
        base: the recipe; its `seed` is the first of the seeds.
        settings: see `debiaskd.recipe.sweep.settings`.
        seeds: trainings of each setting.
        out: folder of the sweep.

    Raises:
        RecipeError: a setting does not fit the recipe; names it.
        RunError: a trial's folder holds the run of another recipe, or of other data.
    """
    stages = base.compute.stages or str(out / "stages")
    found = []
    for setting in settings:
        for seed in range(base.seed, base.seed + seeds):
            try:
                recipe = read(base, {**setting.values, "seed": seed, "compute.stages": stages})
            except RecipeError as error:
                raise RecipeError(f"--over: {setting}: {str(error).removeprefix('--')}") from None
            found.append(Trial(setting, seed, recipe, out / "trials" / f"{setting.slug}-seed{seed}"))
            _check_folder(found[-1])
    return found


def _check_folder(trial: Trial) -> None:
    if not (trial.folder / "recipe.yaml").is_file():
        return
    before, now = (decisive(to_dict(one)) for one in (open_run(trial.folder), trial.recipe))
    difference = first_difference(before, now)
    if difference is not None:
        key, old, new = difference
        raise RunError(f"{trial.folder}: was begun with {key}: {old}, not {new}; choose another --out")
    finished_before(trial)


def check(found: Sequence[Trial], fabric: Any) -> Criterion:
    """Build the networks of every setting and run a training step of each, before the first trial.

    Args:
        found: the trials.
        fabric: launched.

    Returns:
        What they are compared by.

    Raises:
        RecipeError, DataError, NetworkError: a setting cannot be trained, or they do not compare; names the setting.
    """
    criteria: dict[Criterion, Setting] = {}
    firsts = {trial.setting.slug: trial for trial in reversed(found)}
    for trial in reversed(firsts.values()):
        with tempfile.TemporaryDirectory() as folder:
            try:
                pipeline = Pipeline(trial.recipe, Path(folder), fabric, lambda *news: None)
            except (RecipeError, NetworkError) as error:
                raise type(error)(f"--over: {trial.setting}: {error}") from error
            pipeline.run.release()
        rule: str = student_selection(pipeline.trainer).get("rule", pipeline.trainer.rule)
        criterion = Criterion(rule, rule_metrics(rule, pipeline.trainer.validation))
        if not criterion.names:
            raise RecipeError(f"selection.rule: {rule} compares no metric, so that nothing can be chosen by it")
        criteria.setdefault(criterion, trial.setting)
    if len(criteria) > 1:
        said = "; ".join(f"{criterion.rule} for {setting}" for criterion, setting in criteria.items())
        raise RecipeError(f"selection.rule: is left out, and its default differs ({said}); name one")
    return next(iter(criteria))


def finished_before(trial: Trial) -> Outcome | None:
    """What came of a trial that was finished earlier; None: it was not.

    Raises:
        RunError: its files are damaged, or it was trained on other data.
    """
    if not (trial.folder / "student" / STAGE).is_file():
        return None
    stage = finished(trial.folder, "student")
    data = data_fingerprint(trial.recipe.data.path)
    if stage.inputs.get("data") != data:
        raise RunError(f"{trial.folder}: was trained on other data than {trial.recipe.data.path} holds now")
    return _outcome(trial, stage)


def run(trial: Trial, fabric: Any, progress: ProgressCallback) -> Outcome:
    """Train one; what goes wrong in it is in the outcome.

    Raises:
        OSError: files cannot be written, which would be so for the next one, too.
        Exception: with several processes, whatever may have happened to one of them alone.
    """
    done = finished_before(trial)
    if done is not None:
        return done
    try:
        return _outcome(trial, Pipeline(trial.recipe, trial.folder, fabric, progress).student())
    except OSError:
        raise
    except Exception as error:  # of a network or a term of the user's it may be any
        if fabric.world_size > 1 and not isinstance(error, TOGETHER):
            raise
        kind = "" if isinstance(error, TOGETHER) else f"{type(error).__name__}: "
        return Outcome(trial, None, error=kind + " ".join(str(error).split()))


def _outcome(trial: Trial, stage: Stage) -> Outcome:
    return Outcome(trial, stage.facts, stage.seconds)


def chosen(outcomes: Sequence[Outcome], criterion: Criterion) -> Setting | None:
    """The setting with the highest mean over seeds, the first of equals; None: none can be compared.

    Settings of which a seed failed come after those of which none did.
    """
    best: tuple[tuple[bool, float], Setting] | None = None
    for setting, members in by_setting(outcomes):
        values = [value for value in map(criterion, members) if value is not None]
        if values:
            rank = (len(values) == len(members), sum(values) / len(values))
            if best is None or rank > best[0]:
                best = (rank, setting)
    return None if best is None else best[1]


def by_setting(outcomes: Sequence[Outcome]) -> list[tuple[Setting, list[Outcome]]]:
    """The outcomes of each setting, in the order of the trials."""
    found: dict[str, tuple[Setting, list[Outcome]]] = {}
    for outcome in outcomes:
        setting = outcome.trial.setting
        found.setdefault(setting.slug, (setting, []))[1].append(outcome)
    return list(found.values())


def write_best(path: Path, base: Recipe, setting: Setting, about: str) -> None:
    """Write the recipe with the values of a setting, which `debiaskd train` takes."""
    from debiaskd.training.run import as_yaml

    head = f"# {about}\n#   debiaskd train {path}\n"
    files.write_text(path, head + as_yaml(read(base, setting.values)))
