"""Runs that go on after an upgrade, or with a teacher's file that was moved: nothing is trained again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import training_runs as runs
import yaml

from debiaskd.evaluation.evaluate import evaluate_run
from debiaskd.models import registry as networks
from debiaskd.recipe import Recipe
from debiaskd.training import resume as begun
from debiaskd.training.loop import TrainingLoop
from debiaskd.training.run import RunError, digest, open_run

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("stages")]
FAST = {"epochs": 2, "batch": 12, "learning_rate": 1e-2}
EVERYTHING: dict[str, Any] = {
    **runs.taught(FAST, {"kd": {"weighted": True}}, method="jtt", up=5.0, cache="fp32"),
    "weights": {"method": "errors", "up": 5.0},
    "pretraining": FAST,
    "compute": {"accelerator": "cpu", "checkpoint_every": 1},
}
#: Keys at their defaults, of every part of a recipe; for the trial, they are the ones that came with an upgrade.
NEWER = (
    "data.flip",
    "student.bias_free",
    "teacher.bias_free",
    "teacher.step_size",
    "teacher.schedule.clip",
    "schedule.accumulate",
    "pretraining.ema",
    "terms.kd.temperature",
    "terms.guide",
    "terms.explain",
    "weights.convention",
    "selection.every",
    "selection.reuse",
    "compute.sync_batchnorm",
    "transplant",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("begun"))


def without(document: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    for key in keys:
        *parents, last = key.split(".")
        part = document
        for parent in parents:
            part = part[parent]
        del part[last]
    return document


def trim(run: Path) -> None:
    """The recipe as a version wrote it that knew nothing of `NEWER`."""
    file = run / "recipe.yaml"
    file.write_text(yaml.safe_dump(without(yaml.safe_load(file.read_text()), NEWER)))


@pytest.mark.filterwarnings("ignore::debiaskd.reweight.ErrorSetWarning")
def test_a_recipe_that_lacks_newer_keys_takes_their_defaults(data: Path, tmp_path: Path, trained: list[str]) -> None:
    recipe, run = runs.write(tmp_path / "r.yaml", data, EVERYTHING), tmp_path / "run"
    runs.train(recipe, run)
    assert len(trained) == 5
    figures, _ = evaluate_run(run, "student", None, None)
    trim(run)
    assert open_run(run).selection.every == 1
    assert evaluate_run(run, "student", None, None)[0]["figures"] == figures["figures"]
    trained.clear()
    runs.train(recipe, run)
    assert trained == []
    trim(run)
    (run / "begun.yaml").unlink()  # which those versions did not write
    runs.train(recipe, run)
    assert trained == []
    with pytest.raises(RunError, match=r"was begun with selection\.every: None, not 2"):
        runs.train(recipe, run, "--selection.every", "2")


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stage", ["teacher-identification", "pretraining", "student"])
@pytest.mark.filterwarnings("ignore::debiaskd.reweight.ErrorSetWarning")
def test_an_interrupted_run_of_an_earlier_version_goes_on_where_it_was(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    document = {**EVERYTHING, "teacher": {key: v for key, v in EVERYTHING["teacher"].items() if key != "cache"}}
    recipe, run = runs.write(tmp_path / "r.yaml", data, document), tmp_path / "run"
    inner = TrainingLoop._step
    with monkeypatch.context() as older:
        # How an earlier version makes fingerprints: of all that it has, which is what recipe.yaml says.
        trimmed = without(yaml.safe_load(yaml.safe_dump(written(recipe))), NEWER)
        older.setattr(begun, "align_recipe", lambda before, now: trimmed)
        older.setattr(begun, "read", lambda folder: trimmed)
        older.setattr(TrainingLoop, "_step", stopping(stage))
        with pytest.raises(StoppedError):
            runs.train(recipe, run)
    trim(run)
    (run / "begun.yaml").unlink()
    first: dict[str, int] = {}

    def noted(self: TrainingLoop, *arguments: Any) -> None:
        first.setdefault(self.plan.folder.name, self.step)
        inner(self, *arguments)

    monkeypatch.setattr(TrainingLoop, "_step", noted)
    runs.train(recipe, run)
    assert first[stage] == 3 and set(list(first.values())[1:]) <= {0}
    assert yaml.safe_load((run / "begun.yaml").read_text()) == trimmed
    assert yaml.safe_load((run / "recipe.yaml").read_text()) == written(recipe)


def written(recipe: Path) -> dict[str, Any]:
    from debiaskd.recipe import to_dict

    return to_dict(runs.read(recipe))


def stopping(stage: str) -> Any:
    inner = TrainingLoop._step

    def step(self: TrainingLoop, *arguments: Any) -> None:
        if self.plan.folder.name == stage and self.step == 3:
            raise StoppedError
        inner(self, *arguments)

    return step


def test_stages_that_say_less_or_more_than_now_are_the_same() -> None:
    before = {"recipe": {"selection": {"rule": None}, "seed": 3}, "data": "a", "student": {"name": "x", "later": 5}}
    now = {"recipe": {"selection": {"rule": None, "every": 1}, "seed": 3}, "data": "a", "student": {"name": "x"}}
    assert not begun.same_inputs(before, now), "what was said of a key that there is no more counts"
    del before["student"]["later"]
    assert begun.same_inputs(before, now) and begun.same_inputs(now, before)
    now["recipe"]["selection"]["every"] = 2
    assert not begun.same_inputs(before, now) and not begun.same_inputs(now, before)
    assert not begun.same_inputs({"teacher": "a"}, {"teacher": {"name": "x"}})


def test_without_newer_keeps_what_is_said() -> None:
    now = {"seed": 0, "selection": {"rule": None, "every": 1, "reuse": True}, "student": {"name": "a", "head": None}}
    before = {"selection": {"rule": None}, "student": {"name": "a"}}
    expected = {"selection": {"rule": None, "reuse": True}, "student": {"name": "a"}}
    assert begun.without_new_defaults(Recipe, before, now) == expected


# -- files that were moved --------------------------------------------------------------------------------------------


def test_a_teachers_file_that_moved_is_known_by_its_content(data: Path, tmp_path: Path, trained: list[str]) -> None:
    torch.manual_seed(3)
    networks.save_weights(runs.Plain(2, 6), tmp_path / "t.safetensors", {})
    networks.save_weights(runs.Plain(2, 4), tmp_path / "s.safetensors", {})
    document = {
        "teacher": {"name": "plain/6", "weights": str(tmp_path / "t.safetensors")},
        "student": {"name": "plain/4", "weights": str(tmp_path / "s.safetensors")},
        "terms": {"kd": {}},
        "pretraining": FAST,
        "schedule": FAST,
        "compute": {"accelerator": "cpu"},
    }
    recipe, run = runs.write(tmp_path / "r.yaml", data, document), tmp_path / "run"
    runs.train(recipe, run)
    (tmp_path / "moved").mkdir()
    moved = {}
    for network, name in (("teacher", "t.safetensors"), ("student", "s.safetensors")):
        moved[network] = shutil.move(tmp_path / name, tmp_path / "moved" / f"x-{name}")
    overrides = [text for network, path in moved.items() for text in (f"--{network}.weights", str(path))]
    trained.clear()
    for _ in range(2):
        runs.train(recipe, run, *overrides)
        assert trained == [] and open_run(run).teacher.weights == str(moved["teacher"])  # type: ignore[union-attr]
    shutil.rmtree(run / "student")  # goes on with what was finished
    runs.train(recipe, run, *overrides)
    assert trained == ["student"]
    networks.save_weights(runs.Plain(2, 6), moved["teacher"], {})
    with pytest.raises(
        RunError, match=r"pretraining: was made with teacher\.weights: \w{64}, not \w{64}; choose another"
    ):
        runs.train(recipe, run, *overrides)


def test_an_interrupted_run_goes_on_with_a_file_that_moved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    networks.save_weights(runs.Plain(2, 6), tmp_path / "t.safetensors", {})
    document = {
        "teacher": {"name": "plain/6", "weights": str(tmp_path / "t.safetensors")},
        "student": {"name": "plain/4"},
        "terms": {"kd": {}},
        "schedule": FAST,
        "compute": {"accelerator": "cpu", "checkpoint_every": 1},
    }
    recipe, run = runs.write(tmp_path / "r.yaml", data, document), tmp_path / "run"
    inner, first = TrainingLoop._step, []
    with monkeypatch.context() as once:
        once.setattr(TrainingLoop, "_step", stopping("student"))
        with pytest.raises(StoppedError):
            runs.train(recipe, run)
    moved = shutil.move(tmp_path / "t.safetensors", tmp_path / "u.safetensors")
    monkeypatch.setattr(TrainingLoop, "_step", lambda self, *rest: (first.append(self.step), inner(self, *rest)))
    runs.train(recipe, run, "--teacher.weights", str(moved))
    assert first[0] == 3


def test_a_run_that_begins_writes_what_it_was_begun_with(data: Path, tmp_path: Path) -> None:
    document = {**runs.PLAIN, "schedule": {**runs.PLAIN["schedule"], "epochs": 1}}
    recipe, run = runs.write(tmp_path / "r.yaml", data, document), tmp_path / "run"
    runs.train(recipe, run)
    before = (run / "begun.yaml").read_text()
    assert before == (run / "recipe.yaml").read_text()
    inputs = json.loads((run / "student" / "stage.json").read_text())
    assert inputs["fingerprint"] == digest({"format": 1, **inputs["inputs"]})
    runs.train(recipe, run, "--compute.log_every", "7")  # which decides nothing
    assert (run / "begun.yaml").read_text() == before != (run / "recipe.yaml").read_text()
