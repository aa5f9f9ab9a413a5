"""`compute.loggers`: what TensorBoard, Weights & Biases and MLflow get, once each, and refusals of what is missing."""

from __future__ import annotations

import csv
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import training_runs as runs
from cli_runs import command, failed

from debiaskd.training import loggers
from debiaskd.training.loop import TrainingLoop

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("stages")]
#: Four steps an epoch, a line of the log every two.
LOGGED: dict[str, Any] = {
    **runs.PLAIN,
    "selection": {"attributions": False},
    "compute": {"accelerator": "cpu", "log_every": 2, "checkpoint_every": 3},
}
STEPS, EPOCHS = [2, 4, 6, 8], [4, 8]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("loggers"))


def recipe(folder: Path, data: Path, names: list[str] | None) -> Path:
    return runs.write(folder / "r.yaml", data, {**LOGGED, "compute": {**LOGGED["compute"], "loggers": names}})


def interrupted(file: Path, run: Path, monkeypatch: pytest.MonkeyPatch, step: int = 5) -> None:
    """Train in two goes: the first ends before a step, and resumes from a checkpoint before rows that were sent."""
    inner = TrainingLoop._step

    def dying(self: TrainingLoop, *arguments: Any) -> None:
        if self.step == step:
            raise KeyboardInterrupt
        inner(self, *arguments)

    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(TrainingLoop, "_step", dying)
        runs.train(file, run)
    for checkpoint in sorted((run / "student/checkpoints").glob("*4.*")):  # of the epoch's end: it resumes at step 3
        checkpoint.unlink()
    runs.train(file, run)


def table(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


class Fake:
    """A logger of Lightning's that keeps what it gets."""

    made: list[Fake] = []  # noqa: RUF012

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options
        self.run_id = options.get("run_id") or "new"
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.config: dict[str, Any] = {}
        self.ended: list[str] = []
        self.experiment = types.SimpleNamespace(finish=lambda: self.ended.append("finished"))
        Fake.made.append(self)

    def log_hyperparams(self, config: dict[str, Any]) -> None:
        self.config = config

    def log_metrics(self, row: dict[str, float], step: int) -> None:
        self.rows.append((step, row))

    def finalize(self, status: str) -> None:
        self.ended.append(status)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    module = types.ModuleType("pytorch_lightning.loggers")
    module.WandbLogger = module.MLFlowLogger = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.loggers", module)
    monkeypatch.setattr(loggers, "find_spec", lambda name: object())
    monkeypatch.setattr(Fake, "made", [])
    for name in ("WANDB_PROJECT", "WANDB_DIR", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return Fake


def test_every_row_is_sent_once_also_by_a_training_that_resumes(
    data: Path, tmp_path: Path, fakes: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    interrupted(recipe(tmp_path, data, ["wandb", "mlflow"]), run, monkeypatch)
    assert len(fakes.made) == 4  # of each, one in either go
    log, epochs = table(run / "student/log.csv"), table(run / "student/epochs.csv")
    for first, second in (fakes.made[0::2], fakes.made[1::2]):
        sent = [*first.rows, *second.rows]
        train = [(step, row) for step, row in sent if "train/loss" in row]
        validation = [(step, row) for step, row in sent if "validation/accuracy" in row]
        assert [step for step, _ in train] == STEPS and [step for step, _ in validation] == EPOCHS
        for row, (step, numbers) in zip(log, train):
            assert int(row["step"]) == step
            for name in ("loss", "supervised", "learning_rate"):
                assert numbers[f"train/{name}"] == float(row[name])
        for row, (_, numbers) in zip(epochs, validation):
            assert numbers["validation/worst_group_accuracy"] == float(row["worst_group_accuracy"])
        assert (first.ended, second.ended[0]) == ([], "success") and second.config == {}
        assert first.config["stage"] == "student" and first.config["schedule"]["batch"] == 12
    wandb, mlflow = fakes.made[2:]
    ids = json.loads((run / "student/loggers.json").read_text())
    assert wandb.options["id"] == fakes.made[0].options["id"] == ids["wandb"] and wandb.ended[-1] == "finished"
    assert (wandb.options["name"], wandb.options["project"]) == ("run/student", "debiaskd")
    assert mlflow.options["run_id"] == ids["mlflow"] == "new" and fakes.made[1].options["run_id"] is None
    assert mlflow.options["tracking_uri"] == f"sqlite:///{run.resolve()}/student/mlflow.db"


def test_tensorboard_has_each_step_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted(recipe(tmp_path, data, None), tmp_path / "run", monkeypatch)
    found = EventAccumulator(str(tmp_path / "run/student/tensorboard")).Reload()
    assert [event.step for event in found.Scalars("train/loss")] == STEPS
    assert [event.step for event in found.Scalars("validation/accuracy")] == EPOCHS
    assert "train/learning_rate" in found.Tags()["scalars"] and "train/supervised" in found.Tags()["scalars"]


def test_mlflow_itself_has_each_step_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow-skinny")
    pytest.importorskip("pytorch_lightning")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs all of mlflow
    interrupted(recipe(tmp_path, data, ["mlflow"]), tmp_path / "run", monkeypatch)
    client = MlflowClient(f"file:{tmp_path / 'mlruns'}")
    experiment = client.get_experiment_by_name("debiaskd")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("run/student", "FINISHED")
    assert found.data.params["schedule/batch"] == "12" and found.data.params["stage"] == "student"
    for name, steps in (("train/supervised", STEPS), ("validation/worst_group_accuracy", EPOCHS)):
        assert [entry.step for entry in client.get_metric_history(found.info.run_id, name)] == steps


def test_no_logger_leaves_the_csv_files_alone(data: Path, tmp_path: Path) -> None:
    runs.train(recipe(tmp_path, data, ["csv"]), tmp_path / "run")
    assert [int(row["step"]) for row in table(tmp_path / "run/student/log.csv")] == STEPS
    assert not (tmp_path / "run/student/tensorboard").exists() and not (tmp_path / "run/student/loggers.json").exists()
    # Loggers have no influence on what is learned: the run continues with others.
    assert runs.train(recipe(tmp_path, data, []), tmp_path / "run").facts["epochs"] == 2


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("[wandb]", "compute.loggers: wandb needs wandb: pip install wandb"),
        ("[csv, mlflow]", "compute.loggers: mlflow needs lightning and mlflow: pip install lightning mlflow"),
        ("[csv, csv]", "compute.loggers: must be different names, got ['csv', 'csv']"),
        ("[neptune]", "compute.loggers"),
    ],
)
def test_a_logger_that_is_not_there_is_refused_before_training(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    names: str,
    expected: str,
) -> None:
    there = {"pytorch_lightning"} if "wandb" in names else set()
    monkeypatch.setattr(loggers, "find_spec", lambda name: object() if name in there else None)
    file = recipe(tmp_path, data, None)
    said = failed(*command(capsys, "train", file, "--out", tmp_path / "run", "--compute.loggers", names))
    assert expected in said and not (tmp_path / "run").exists()
