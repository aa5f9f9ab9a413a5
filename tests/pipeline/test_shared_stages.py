"""Stages that runs share: made once, the same bytes as unshared, and what happens to damaged and unfinished ones."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import processes
import training_runs as runs

from debiaskd.recipe import RecipeError
from debiaskd.training import shared_stages
from debiaskd.training.fit import Trainer
from debiaskd.training.run import RunError, finished

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::debiaskd.reweight.ErrorSetWarning"),
]
FAST = {"epochs": 1, "batch": 12, "learning_rate": 1e-2}
DETT: dict[str, Any] = {
    "student": {"name": "plain/4"},
    "teacher": {"name": "plain/6", "method": "balanced", "schedule": FAST, "cache": "fp32"},
    "transplant": {"projector": "linear"},
    "weights": {"method": "errors", "up": 20},
    "schedule": FAST,
    "terms": {"match": {}},
    "compute": {"accelerator": "cpu", "checkpoints": False},
}
BEFORE = ["identification", "teacher", "teacher-cache", "weights"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that are trained, in order."""
    found: list[str] = []
    inner = Trainer.fit

    def fit(self: Trainer, name: str, *arguments: Any, **options: Any) -> Any:
        found.append(name)
        return inner(self, name, *arguments, **options)

    monkeypatch.setattr(Trainer, "fit", fit)
    return found


def train(folder: Path, data: Path, name: str, *overrides: str, shared: bool = True) -> Path:
    where = ["--compute.stages", str(folder / "stages")] if shared else []
    runs.train(runs.write(folder / "recipe.yaml", data, DETT), folder / name, *where, *overrides)
    return folder / name


def names(folder: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in folder.iterdir() if not path.name.startswith("."))


def contents(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.suffix in (".safetensors", ".npy") or path.name in ("log.csv", "epochs.csv")
    }


def test_a_sweep_trains_teacher_and_identification_once(tmp_path: Path, data: Path, fitted: list[str]) -> None:
    first = train(tmp_path, data, "first")
    assert fitted == ["identification", "teacher", "student"]
    assert names(tmp_path / "stages") == BEFORE
    fitted.clear()
    other = train(tmp_path, data, "other", "--weights.up", "40")
    assert fitted == ["student"]
    assert names(tmp_path / "stages") == [*BEFORE, "weights"]
    for name in ("identification", "teacher", "teacher-cache"):
        assert finished(first, name).fingerprint == finished(other, name).fingerprint
    assert finished(first, "weights").fingerprint != finished(other, "weights").fingerprint
    fitted.clear()
    train(tmp_path, data, "third", "--seed", "1")
    assert fitted == ["identification", "teacher", "student"]


def test_sharing_does_not_change_a_byte(tmp_path: Path, data: Path, fitted: list[str]) -> None:
    alone = train(tmp_path, data, "alone", shared=False)
    first = train(tmp_path, data, "first")
    fitted.clear()
    second = train(tmp_path, data, "second")
    assert fitted == ["student"]
    assert contents(alone) == contents(first) == contents(second)
    assert len(contents(alone)) > 8


def test_a_run_is_complete_without_the_shared_folder(tmp_path: Path, data: Path, fitted: list[str]) -> None:
    run = train(tmp_path, data, "run")
    (tmp_path / "stages").rename(tmp_path / "elsewhere")
    assert finished(run, "teacher").seconds is not None
    fitted.clear()
    train(tmp_path, data, "run")
    assert fitted == []


@pytest.mark.parametrize("links", [True, False])
def test_files_are_linked_or_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*paths: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    place, target = tmp_path / "teacher-0", tmp_path / "run" / "teacher"
    (place / "kept").mkdir(parents=True)
    target.mkdir(parents=True)
    (tmp_path / "run" / ".unfinished-teacher").mkdir()  # of a process that was killed
    (place / "kept" / "epoch").write_text("weights")
    (place / ".unfinished-log.csv").write_text("")
    shared_stages.SharedStages(tmp_path).link(place, target)
    assert sorted(path.name for path in target.rglob("*")) == ["epoch", "kept"]
    assert (target / "kept" / "epoch").samefile(place / "kept" / "epoch") is links
    assert [path.name for path in target.parent.iterdir()] == ["teacher"]


def test_damage_is_named(tmp_path: Path, data: Path) -> None:
    train(tmp_path, data, "first")
    (stage,) = (tmp_path / "stages").glob("teacher-" + "?" * 12)
    content = (stage / "model.safetensors").read_bytes()
    (stage / "model.safetensors").write_bytes(content[:-1] + b"?")
    with pytest.raises(RunError, match=rf"{stage.name}/model.safetensors: missing or damaged; remove \S*{stage.name} "):
        train(tmp_path, data, "second")
    assert not (tmp_path / "second" / "teacher").exists()
    (stage / "stage.json").write_text("{")
    with pytest.raises(RunError, match=rf"{stage.name}/stage.json: damaged; remove \S*{stage.name} and train again"):
        train(tmp_path, data, "second")


@pytest.mark.parametrize("checkpoints", [True, False])
def test_an_interrupted_stage_is_continued_by_another_run(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: bool
) -> None:
    """With checkpoints from where it was, without them from its beginning; the outcome is the same."""
    options = ["--teacher.schedule.epochs", "2", "--compute.checkpoints", str(checkpoints).lower()]
    whole = train(tmp_path, data, "whole", *options, shared=False)
    from debiaskd.training.loop import TrainingLoop

    inner, steps = TrainingLoop._step, list[int]()

    def dying(self: TrainingLoop, *arguments: Any) -> None:
        if self.plan.folder.name.startswith("teacher-"):
            if len(steps) == 5:
                raise KeyboardInterrupt
            steps.append(self.step)
        inner(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingLoop, "_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, data, "first", *options)
    assert steps == [0, 1, 2, 3, 4]
    (stage,) = (tmp_path / "stages").glob("teacher-" + "?" * 12)
    assert not (stage / "stage.json").exists() and (stage / "checkpoints").is_dir() is checkpoints

    def counting(self: TrainingLoop, *arguments: Any) -> None:
        if self.plan.folder == stage:
            steps.append(self.step)
        inner(self, *arguments)

    monkeypatch.setattr(TrainingLoop, "_step", counting)
    second = train(tmp_path, data, "second", *options)
    assert steps[5:] == ([4, 5, 6, 7] if checkpoints else list(range(8)))
    assert contents(second) == contents(whole)


def test_a_stage_that_a_run_has_begun_is_finished_there(tmp_path: Path, data: Path, fitted: list[str]) -> None:
    run = train(tmp_path, data, "run", shared=False)
    for name in ("student", "weights", "teacher", "teacher-cache"):
        (run / name / "stage.json").unlink()
    train(tmp_path, data, "run")
    assert fitted[3:] == ["teacher", "student"]
    assert not (tmp_path / "stages").exists()


HOLDER = """
import sys, time
from pathlib import Path
from debiaskd.utils.files import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
while not Path(sys.argv[2]).exists():
    time.sleep(0.01)
"""


@pytest.mark.xdist_group("processes")
def test_others_wait_for_the_process_that_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fcntl", reason="no record locks here")
    monkeypatch.setattr(shared_stages, "INTERVAL", 0.01)
    news: list[str] = []
    waiting = threading.Event()
    shared = shared_stages.SharedStages(tmp_path, news=lambda text: (news.append(text), waiting.set())[0])
    place = shared.place("teacher", "0123456789abcdef")
    holder = processes.Process("-c", HOLDER, tmp_path / f".{place.name}.lock", tmp_path / "end")
    order: list[str] = []

    def enter() -> None:
        with shared.locked(place):
            order.append("entered")

    thread = threading.Thread(target=enter)
    try:
        holder.wait_for("stdout", "held\n")
        thread.start()
        assert waiting.wait(20)
        order.append("released")
        (tmp_path / "end").touch()
        thread.join(20)
    finally:
        holder.kill()
    assert order == ["released", "entered"]
    assert news == [f"waits for another process, which makes {tmp_path / 'teacher-0123456789ab'}"]


# -- the fingerprint covers what decides the bytes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "change", "stage"),
    [
        ({"weights": {"method": "groups"}}, {"data": {"train": "train[:75%]"}}, "weights"),
        ({}, {"compute": {"precision": "bf16"}}, "teacher-cache"),
        (
            {
                "teacher": None,
                "transplant": None,
                "weights": None,
                "terms": {"supervised": {}, "guide": {"layer": "Final"}},
                "pretraining": FAST,
                "selection": {"rule": "pareto"},
            },
            {"terms": {"supervised": {}, "guide": {"layer": "Input"}}},
            "pretraining",
        ),
    ],
)
def test_runs_that_differ_in_it_do_not_share_a_stage(
    tmp_path: Path, data: Path, base: dict[str, Any], change: dict[str, Any], stage: str
) -> None:
    found = []
    for number, added in enumerate(({}, change)):
        document = {**DETT, **base, **added}
        document["compute"] = {**DETT["compute"], **added.get("compute", {}), "stages": str(tmp_path / "stages")}
        document = {key: value for key, value in document.items() if value is not None}
        runs.train(runs.write(tmp_path / f"{number}.yaml", data, document), tmp_path / str(number))
        found.append(finished(tmp_path / str(number), stage).fingerprint)
    assert found[0] != found[1]


def test_a_stage_of_an_earlier_version_is_used(tmp_path: Path, data: Path, fitted: list[str]) -> None:
    """Its recipe lacks a key that has come since, and its fingerprint is of another text."""
    train(tmp_path, data, "first")
    (stage,) = (tmp_path / "stages").glob("identification-*")
    document = json.loads((stage / "stage.json").read_text())
    del document["inputs"]["pictures"]["crop_scale"]
    document["fingerprint"] = "f" * 64
    (stage / "stage.json").unlink()
    (stage / "stage.json").write_text(json.dumps(document))
    stage.rename(stage.with_name("identification-" + "f" * 12))
    fitted.clear()
    train(tmp_path, data, "second", "--weights.up", "7")
    assert fitted == ["student"]


def test_what_does_not_fit_together(tmp_path: Path, data: Path) -> None:
    with pytest.raises(RecipeError, match=r"compute.checkpoint_every: compute.checkpoints is false, got 3"):
        train(tmp_path, data, "run", "--compute.checkpoint_every", "3")
