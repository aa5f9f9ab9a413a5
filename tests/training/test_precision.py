"""What a step is made of: its rate, the model's mode, clipped gradients, and float16 with a loss scaler."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import training_runs as runs
from training_runs import PLAIN

from debiaskd.models import registry as networks
from debiaskd.recipe import Schedule
from debiaskd.training.dry_run import DryRun
from debiaskd.training.loop import TrainingLoop
from debiaskd.training.schedule import rate

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("student_runs")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("precision"))


def run(data: Path, folder: Path, document: dict[str, Any], *overrides: str) -> Any:
    folder.mkdir()
    return runs.train(runs.write(folder / "recipe.yaml", data, document), folder / "run", *overrides)


def rows(stage: Any) -> list[dict[str, str]]:
    with open(stage.folder / "log.csv") as file:
        return list(csv.DictReader(file))


def test_each_step_has_its_rate_and_trains_in_training_mode(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    modes: list[bool] = []
    seeds: list[int] = []

    class Noting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.extend(group["lr"] for group in self.param_groups[:1])
            return super().step(closure)

    class Moody(runs.Plain):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            modes.append(self.training)
            seeds.extend([torch.initial_seed()] * self.training)
            return super().forward(images)

    monkeypatch.setattr(torch.optim, "SGD", Noting)
    monkeypatch.setattr(DryRun, "run", lambda self, learner: None)
    monkeypatch.setitem(networks._FAMILIES, "moody", lambda width, classes, pretrained: Moody(classes, int(width)))
    schedule = {"epochs": 3, "batch": 12, "learning_rate": 0.1, "optimizer": "sgd", "warmup": 1, "shape": "cosine"}
    schedule["accumulate"] = 2
    compute = {"accelerator": "cpu", "log_every": 1}
    stage = run(
        data, tmp_path / "r", {**PLAIN, "student": {"name": "moody/4"}, "schedule": schedule, "compute": compute}
    )
    expected = [rate(Schedule(**schedule), step, 4) for step in range(12)]  # type: ignore[arg-type]
    assert rates == pytest.approx(expected) and len(set(rates)) > 8
    assert [float(row["learning_rate"]) for row in rows(stage)] == pytest.approx(expected)
    told = "".join("t" if mode else "v" for mode in modes).lstrip("v")
    assert re.fullmatch(r"(t{8}v{2,}){3}", told), "four steps of two passes, then validation, three times"
    assert len(set(seeds)) == 24, "of every pass its own"


def half_precision(monkeypatch: pytest.MonkeyPatch, scale: float) -> list[torch.amp.GradScaler]:
    """What `compute.precision: 16` asks Fabric for on a GPU; on a CPU it has to be handed over."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.precision.amp import MixedPrecision

    scalers = []

    def launch(compute: object) -> Fabric:
        scalers.append(torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=5))
        fabric = Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scalers[-1]))
        fabric.launch()
        return fabric

    monkeypatch.setattr(runs, "launch", launch)
    return scalers


def test_every_term_trains_in_float16_with_a_loss_scaler(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["--schedule.epochs", "3", "--schedule.warmup", "0"]
    single = run(data, tmp_path / "32", runs.EVERYTHING, *overrides)
    scalers = half_precision(monkeypatch, 2.0**10)
    half = run(data, tmp_path / "16", runs.EVERYTHING, *overrides)
    assert scalers[0].get_scale() != 2.0**10, "steps were taken, or left out"
    logs = [rows(stage)[-1] for stage in (single, half)]
    assert {"match", "kd", "sample", "relation", "backdoor", "guide"} <= set(logs[1])
    for name, value in logs[0].items():
        assert float(logs[1][name]) == pytest.approx(float(value), rel=0.1, abs=0.05), name


def test_the_loss_scaler_goes_on_as_it_was(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = {**PLAIN, "compute": {"accelerator": "cpu", "checkpoint_every": 3}}
    scalers = half_precision(monkeypatch, 2.0**24)
    whole = run(data, tmp_path / "whole", document).model
    inner = TrainingLoop._step

    def stops(self: TrainingLoop, *arguments: Any) -> None:
        if self.step == 5:
            raise KeyboardInterrupt
        inner(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_step", stops)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "run", document)
    again = runs.train(tmp_path / "run" / "recipe.yaml", tmp_path / "run" / "run").model
    assert again.read_bytes() == whole.read_bytes()
    assert scalers[2].get_scale() == scalers[0].get_scale() < 2.0**24


def test_clipping_bounds_the_norm_of_all_gradients(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each step of SGD; with a loss scaler of the true gradients, and a step that overflows is left out."""
    norms: list[float] = []

    class Noting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            each = [p.grad.norm() for group in self.param_groups for p in group["params"]]
            norms.append(float(torch.stack(each).norm()))
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Noting)
    options = ("--schedule.optimizer", "sgd", "--schedule.accumulate", "2")
    run(data, tmp_path / "free", PLAIN, *options)
    least, free = min(norms), list(norms)
    norms.clear()
    run(data, tmp_path / "clipped", PLAIN, *options, "--schedule.clip", str(least / 2))
    assert len(free) == len(norms) == 8 and norms == pytest.approx([least / 2] * 8, rel=1e-3)
    norms.clear()
    scalers = half_precision(monkeypatch, 2.0**24)
    run(data, tmp_path / "half", PLAIN, *options, "--schedule.clip", str(least / 2))
    assert 1 <= len(norms) < 8 and norms == pytest.approx([least / 2] * len(norms), rel=1e-2)
    assert scalers[0].get_scale() < 2.0**24
