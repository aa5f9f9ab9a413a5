"""Early stopping: when it ends a training, what the run says of it, and that a killed run stops where another would."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import training_runs as runs
from cli_runs import command, failed

from debiaskd.recipe import Schedule
from debiaskd.training.loop import TrainingLoop
from debiaskd.training.schedule import brief_schedule, rate
from debiaskd.training.selection import CheckpointSelector

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("stages")]
NAN = float("nan")
#: Four steps an epoch, a line of the log every three.
LONG: dict[str, Any] = {
    **runs.PLAIN,
    "schedule": {**runs.PLAIN["schedule"], "epochs": 8, "patience": 2},
    "selection": {"rule": "accuracy", "attributions": False},
    "compute": {"accelerator": "cpu", "log_every": 3},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("stopping"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Accuracies that validation gives instead of the model's own, by epoch."""
    values = [0.5, 0.6, 0.6, 0.6, 0.9, 0.9, 0.9, 0.9]
    inner = TrainingLoop.__init__

    def noted(self: TrainingLoop, plan: Any, *rest: Any) -> None:
        inner(self, plan, *rest)

        def validate(model: Any) -> dict[str, float]:
            return {"accuracy": values[self.step // self.steps - 1]}

        self.plan = dataclasses.replace(plan, validate=validate)

    monkeypatch.setattr(TrainingLoop, "__init__", noted)
    return values


def facts(run: Path, stage: str = "student") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / stage / "stage.json").read_text())["facts"]
    return found


def test_a_plateau_ends_the_training_and_the_run_says_so(
    data: Path, tmp_path: Path, measured: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = runs.write(tmp_path / "r.yaml", data, LONG)
    code, out, err = command(capsys, "train", recipe, "--out", tmp_path / "run")
    why = "no improvement of accuracy on validation in 2 epochs"
    assert code == 0 and f"; stopped after epoch 4: {why}" in out.splitlines()[0]
    assert "student, stopped after epoch 4 of 8: 2 without improvement" in err
    found = facts(tmp_path / "run")
    assert found["stopped"] == {"epochs": 4, "patience": 2, "why": why}
    assert found["epoch"] == 3, "of equals the later is kept, although it is no improvement"
    assert len((tmp_path / "run/student/epochs.csv").read_text().splitlines()) == 5
    log = (tmp_path / "run/student/log.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in log[1:]] == ["3", "6", "9", "12", "15", "16"]
    document = json.loads((tmp_path / "run/student/stage.json").read_text())
    assert document["inputs"]["recipe"]["schedule"]["patience"] == 2


@pytest.mark.parametrize(("step", "more"), [(13, ()), (9, ("--compute.checkpoint_every", "2"))])
def test_a_killed_training_stops_in_the_same_epoch(
    data: Path, tmp_path: Path, measured: list[float], monkeypatch: pytest.MonkeyPatch, step: int, more: tuple[str, ...]
) -> None:
    recipe = runs.write(tmp_path / "r.yaml", data, LONG)
    runs.train(recipe, tmp_path / "whole", *more)
    inner = TrainingLoop._step

    def dying(self: TrainingLoop, *arguments: Any) -> None:
        if self.step == step:
            raise KeyboardInterrupt
        inner(self, *arguments)

    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(TrainingLoop, "_step", dying)
        runs.train(recipe, tmp_path / "run", *more)
    runs.train(recipe, tmp_path / "run", *more)
    for name in ("model.safetensors", "stage.json", "log.csv", "epochs.csv"):
        assert (tmp_path / "run/student" / name).read_bytes() == (tmp_path / "whole/student" / name).read_bytes(), name


def test_one_killed_after_its_last_epoch_trains_no_further(
    data: Path, tmp_path: Path, measured: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, inner = runs.write(tmp_path / "r.yaml", data, LONG), CheckpointSelector.prune
    stopped: list[int] = []

    def dying(self: CheckpointSelector, **options: Any) -> None:
        if self.waited() == 2 and not stopped:
            stopped.append(1)
            raise KeyboardInterrupt
        inner(self, **options)

    monkeypatch.setattr(CheckpointSelector, "prune", dying)
    with pytest.raises(KeyboardInterrupt):
        runs.train(recipe, tmp_path / "run")
    monkeypatch.setattr(TrainingLoop, "_step", None)  # not called any more
    runs.train(recipe, tmp_path / "run")
    assert facts(tmp_path / "run")["stopped"]["epochs"] == 4


def test_epochs_before_all_terms_have_their_full_weight_do_not_count(
    data: Path, tmp_path: Path, measured: list[float]
) -> None:
    measured[:] = [0.9] * 8
    document = {**LONG, "terms": {"supervised": {}, "guide": {"weight": 0.1, "start": 2, "ramp": 1}}}
    runs.train(runs.write(tmp_path / "r.yaml", data, document), tmp_path / "run")
    assert facts(tmp_path / "run")["stopped"]["epochs"] == 5  # full weight in the fourth: 3 and 4 from 0 wait


def test_a_training_that_improves_to_its_end_says_nothing(data: Path, tmp_path: Path, measured: list[float]) -> None:
    measured[:] = [0.1 * n for n in range(8)]
    runs.train(runs.write(tmp_path / "r.yaml", data, LONG), tmp_path / "run")
    assert "stopped" not in facts(tmp_path / "run") and facts(tmp_path / "run")["epoch"] == 7


@pytest.mark.parametrize(
    ("rule", "rows", "waited"),
    [
        ("accuracy", [(0.5,), (0.7,), (0.7,), (0.6,)], [0, 0, 1, 2]),
        ("accuracy", [(NAN,), (NAN,), (0.1,), (NAN,)], [0, 1, 0, 1]),
        ("last", [()] * 3, [0, 0, 0]),
        # Beaten, on the front, within a bin of what is there.
        ("pareto", [(0.5, 0.5, 0.5), (0.5, 0.4, 0.5), (0.1, 0.9, 0.1), (0.501, 0.5, 0.5)], [0, 1, 0, 1]),
    ],
)
def test_what_counts_as_an_improvement(
    tmp_path: Path, rule: str, rows: list[tuple[float, ...]], waited: list[int]
) -> None:
    selector, model, found = CheckpointSelector(tmp_path, rule, None, {}), torch.nn.Linear(1, 1), []
    for epoch, row in enumerate(rows):
        selector.update(epoch, dict(zip(selector.names, row)), model, False)
        found.append(selector.waited())
        again = CheckpointSelector(tmp_path, rule, None, {})
        again.load_state_dict(json.loads(json.dumps(selector.state_dict())))
        assert again.waited() == found[-1]
    assert found == waited
    assert selector.waited(settled=len(rows)) == 0


@pytest.mark.parametrize("total", [1, 2, 7, 40])
def test_one_cycle_is_pytorchs(total: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=total, cycle_momentum=False)
    schedule = Schedule(epochs=total, learning_rate=0.3, shape="one_cycle")
    for step in range(total):
        assert rate(schedule, step, 1) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        if step + 1 < total:
            theirs.step()


def test_brief_trainings_do_not_stop_early() -> None:
    schedule = Schedule(shape="one_cycle", patience=3)
    assert (brief_schedule(schedule, 1).patience, brief_schedule(schedule, 1).shape) == (None, "cosine")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--schedule.patience", "0"], "schedule.patience: must be >= 1, got 0"),
        (["--selection.rule", "last"], "schedule.patience: selection.rule last compares no metric; got 2"),
        (
            ["--schedule.shape=one_cycle", "--schedule.warmup=1"],
            "schedule.warmup: shape one_cycle has a rise",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], expected: str
) -> None:
    recipe = runs.write(tmp_path / "r.yaml", data, LONG)
    assert expected in failed(*command(capsys, "train", recipe, "--out", tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()
