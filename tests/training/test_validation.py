"""Validation and evaluation: in the precision of training, with attributions only where something asks for them."""

from __future__ import annotations

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

from debiaskd.evaluation.evaluate import evaluate_run
from debiaskd.recipe import Compute, RecipeError
from debiaskd.training import validation as evaluation
from debiaskd.training.fabric import autocast
from debiaskd.training.run import Run
from debiaskd.training.validation import _Metrics

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("stages")]
CPU = torch.device("cpu")
FAST = {"epochs": 1, "batch": 12, "learning_rate": 1e-2}
LABELS: dict[str, Any] = {
    "student": {"name": "plain/4"},
    "schedule": FAST,
    "terms": {"supervised": {}},
    "compute": {"accelerator": "cpu"},
}
GUIDED = {**LABELS, "terms": {"supervised": {}, "guide": {"weight": 0.1}}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("validation"))


def run(data: Path, folder: Path, document: dict[str, Any], *overrides: str) -> Any:
    return runs.train(runs.write(folder / "recipe.yaml", data, document), folder / "run", *overrides)


def test_validation_and_evaluation_run_in_the_precision_of_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: list[torch.dtype] = []
    maps: list[torch.dtype] = []
    classes, attributed = _Metrics.classes, evaluation.attributions

    def noting(self: _Metrics, logits: torch.Tensor, batch: Any) -> None:
        dtypes.append(logits.dtype)
        classes(self, logits, batch)

    def watching(guide: Any, batch: Any) -> Any:
        maps.append(guide.watch(batch.images).logits.dtype)
        return attributed(guide, batch)

    monkeypatch.setattr(_Metrics, "classes", noting)
    monkeypatch.setattr(evaluation, "attributions", watching)
    facts = run(data, tmp_path, GUIDED, "--compute.precision", "bf16").facts
    assert set(dtypes) == set(maps) == {torch.bfloat16}
    dtypes.clear()
    document, _ = evaluate_run(tmp_path / "run", "student", "val", None)
    assert set(dtypes) == set(maps) == {torch.bfloat16}
    known = {name: value for name, value in facts["figures"].items() if value is not None}
    assert {name: document["figures"][name] for name in known} == pytest.approx(known)


def test_what_a_device_does_not_have_is_float32() -> None:
    for precision, dtype in (("32", None), ("16", None), ("bf16", torch.bfloat16)):
        with autocast(Compute(precision=precision), CPU):  # type: ignore[arg-type]
            assert torch.is_autocast_enabled("cpu") is (dtype is not None)
            assert dtype is None or torch.get_autocast_dtype("cpu") == dtype


@pytest.mark.parametrize(
    ("document", "asked"),
    [
        (LABELS, set()),
        ({**LABELS, "selection": {"attributions": True}}, {"student"}),
        ({**LABELS, "selection": {"rule": "pareto"}}, {"student"}),
        (GUIDED, {"student"}),
        ({**GUIDED, "selection": {"attributions": False}}, set()),
        (
            {
                **GUIDED,
                "pretraining": FAST,
                "weights": {"epochs": 1},
                "terms": {**GUIDED["terms"], "kd": {"weighted": True}},
                "teacher": {"name": "plain/4", "method": "erm", "schedule": FAST},
            },
            {"student"},
        ),
        (
            {
                **LABELS,
                "terms": {"kd": {}},
                "teacher": {"name": "plain/4", "method": "erm", "schedule": FAST},
                "selection": {"rule": "pareto"},
            },
            {"teacher", "student"},
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::debiaskd.reweight.ErrorSetWarning")
def test_attributions_are_made_where_something_asks_for_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: dict[str, Any], asked: set[str]
) -> None:
    made: set[str] = set()
    stages: list[str] = []
    inner, attributed = Run.stage, evaluation.attributions

    def stage(self: Run, name: str, inputs: Any, make: Any, **options: Any) -> Any:
        def named(folder: Path, fingerprint: str) -> Any:
            stages.append(name)
            return make(folder, fingerprint)

        return inner(self, name, inputs, named, **options)

    monkeypatch.setattr(Run, "stage", stage)
    monkeypatch.setattr(evaluation, "attributions", lambda *given: made.add(stages[-1]) or attributed(*given))
    figures = run(data, tmp_path, document).facts["figures"]
    assert made == asked
    assert ("epg" in figures) is ("iou_threshold" in figures) is ("student" in asked)


def test_a_threshold_that_training_did_not_choose_is_chosen_on_validation(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, asked in (("with", "true"), ("without", "null")):
        (tmp_path / name).mkdir()
        run(data, tmp_path / name, LABELS, "--selection.attributions", asked)
        document, path = evaluate_run(tmp_path / name / "run", "student", None, None)
        facts = json.loads((tmp_path / name / "run" / "student" / "stage.json").read_text())["facts"]
        found.append((document["figures"], facts["figures"].get("iou_threshold"), path))
    assert found[0][0] == found[1][0] and found[1][1] is None
    assert found[0][0]["iou_threshold"] == found[0][1]
    monkeypatch.setattr("debiaskd.evaluation.evaluate.has_boxes", lambda split: split.name == "test")
    document, _ = evaluate_run(tmp_path / "without" / "run", "student", None, None)
    assert document["figures"]["iou_threshold"] == 0.5  # validation has no boxes to choose it by


def test_attributions_need_boxes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("debiaskd.training.data_checks.has_boxes", lambda split: False)
    with pytest.raises(RecipeError, match=r"^selection\.attributions: the validation images have no boxes"):
        run(data, tmp_path, {**LABELS, "selection": {"attributions": True}})
