"""The term `explain` in training: with a cached teacher, beside all other terms, interrupted, in recipes that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")

import training_runs as runs
from safetensors.torch import load_file

from debiaskd.recipe import RecipeError, read
from debiaskd.training.loop import TrainingLoop

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("training")]
#: Every term that can be combined with it, on a transplanted student; guided and explained at layers of their own.
TOGETHER: dict[str, Any] = {
    "data": {"flip": False},
    "teacher": {"name": "plain/8", "method": "erm", "schedule": {"epochs": 1, "batch": 12, "learning_rate": 1e-3}},
    "student": {"name": "plain/6"},
    "transplant": {"projector": "linear"},
    "weights": {"method": "groups"},
    "schedule": {"epochs": 2, "batch": 12, "learning_rate": 1e-2},
    "terms": {
        "match": {},
        "sample": {"weight": 0.1},
        "relation": {"weight": 0.1},
        "backdoor": {"start": 1, "weight": 0.1},
        "guide": {"weight": 0.1},
        "explain": {"layer": "body.model.body.0", "teacher_layer": "body.2", "weighted": True},
    },
    "compute": {"accelerator": "cpu", "checkpoint_every": 1},
}
ALONE: dict[str, Any] = {key: TOGETHER[key] for key in ("data", "teacher", "student", "schedule", "compute")} | {
    "terms": {"explain": {}, "supervised": {"weight": 0.1}}
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("birds"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def test_a_cached_teacher_gives_the_same_student_with_all_terms_together(data: Path, tmp_path: Path) -> None:
    recipe = runs.write(tmp_path / "recipe.yaml", data, TOGETHER)
    runs.train(recipe, tmp_path / "live")
    runs.train(recipe, tmp_path / "cached", "--teacher.cache", "fp32")
    written = {path.stem for path in (tmp_path / "cached" / "teacher-cache").rglob("*.npy")}
    assert written == {"feature", "pooled", "logits", "explanation", "explained"}
    torch.testing.assert_close(weights(tmp_path / "cached"), weights(tmp_path / "live"), rtol=1e-6, atol=1e-6)
    runs.train(recipe, tmp_path / "without", "--terms.explain", "null")
    without, found = weights(tmp_path / "without"), weights(tmp_path / "live")
    assert any((without[name] - found[name]).abs().max() > 1e-3 for name in found), "or the term does nothing"


def test_a_run_that_was_interrupted_goes_on_with_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = runs.write(tmp_path / "recipe.yaml", data, ALONE)
    runs.train(recipe, tmp_path / "whole")
    inner = TrainingLoop._step

    def stops(self: TrainingLoop, *arguments: Any) -> Any:
        if self.plan.folder.name == "student" and self.step == 5:
            raise KeyboardInterrupt
        return inner(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingLoop, "_step", stops)
        runs.train(recipe, tmp_path / "halves")
    runs.train(recipe, tmp_path / "halves")
    whole, halves = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--teacher", "null"], "teacher: is needed by terms.explain"),
        (["--compute.compile", "true"], "compute.compile: .* as terms.explain has to"),
        (["--terms.explain.layer", "body.0"], "terms.explain.teacher_layer: is needed, because layer names one"),
        (["--terms.explain.attribution", "bcos_weights", "--terms.explain.layer", "Final"], "must be Input for bcos_w"),
        (["--terms.explain.weighted", "true"], "terms.explain.weighted: there are no weights"),
    ],
)
def test_options_that_do_not_fit_are_refused(data: Path, tmp_path: Path, changes: list[str], message: str) -> None:
    recipe = runs.write(tmp_path / "recipe.yaml", data, ALONE)
    with pytest.raises(RecipeError, match=message):
        read(recipe, changes)


def test_a_layer_that_the_teacher_does_not_have_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    recipe = runs.write(tmp_path / "recipe.yaml", data, ALONE)
    with pytest.raises(RecipeError, match=r"terms.explain: teacher: .*'nowhere'"):
        runs.train(recipe, tmp_path / "run", "--terms.explain.teacher_layer", "nowhere")
