"""Recipes: options that do not fit together are refused with a message that names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")

from recipe_documents import KD, MATCH, PLAIN, TEACHER, refused, taught, terms, written

from debiaskd.recipe import read

# -- what does not fit together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"path": "x", "annotated_fraction": 0}}, "data.annotated_fraction: must be a share in (0, 1], got 0"),
        ({"data": {"path": "x", "annotated_fraction": 2}}, "data.annotated_fraction: must be a share in (0, 1], got 2"),
        ({"data": {"path": "x", "annotated_fraction": 0.5}}, "only terms.guide uses boxes, and there is none"),
        ({"data": {"path": "x", "dilate": 0.5}}, "only terms.guide uses boxes, and there is none"),
        ({"data": {"path": "x", "dilate": -1}}, "data.dilate: must be a number >= 0, got -1"),
        ({"data": {"path": "x", "size": 0}}, "data.size: must be >= 1, got 0"),
        ({"data": {"path": "x", "crop_scale": [1, 0.5]}}, "must be (smallest, largest) in (0, 1], got (1.0, 0.5)"),
        ({"data": {"path": "x", "crop_scale": [0.5, 2]}}, "must be (smallest, largest) in (0, 1], got (0.5, 2.0)"),
        ({"data": {"path": "x", "crop_scale": [0, 1]}}, "must be (smallest, largest) in (0, 1], got (0.0, 1.0)"),
        ({"compute": {"devices": 0}}, "compute.devices: must be >= 1, got 0"),
        ({"compute": {"nodes": 0}}, "compute.nodes: must be >= 1, got 0"),
        ({"compute": {"log_every": 0}}, "compute.log_every: must be >= 1, got 0"),
        ({"compute": {"checkpoint_every": 0}}, "compute.checkpoint_every: must be >= 1, got 0"),
        ({"compute": {"workers": -1}}, "compute.workers: must be a number >= 0, got -1"),
        ({"selection": {"every": 0}}, "selection.every: must be >= 1, got 0"),
        ({"terms": {}}, "terms: at least one is needed, of supervised, match, kd, sample, relation, backdoor, guide"),
        ({"terms": {"supervised": {"weight": 0}}}, "terms.supervised.weight: must be a number > 0, got 0"),
        ({"terms": {"supervised": {"weight": float("nan")}}}, "terms.supervised.weight: must be a number > 0, got nan"),
        (terms(guide={"start": -1}), "terms.guide.start: must be a number >= 0, got -1"),
        (terms(guide={"ramp": -1}), "terms.guide.ramp: must be a number >= 0, got -1"),
        (terms(guide={"start": 50}), "terms.guide.start: never comes, there are 50 epochs; got 50"),
        ({"terms": {"supervised": {"start": 1}}}, "terms: none counts in epoch 0; one other than backdoor must have"),
        ({"terms": {"backdoor": {}}, **TEACHER}, "terms: none counts in epoch 0; one other than backdoor must have"),
        ({**TEACHER, **terms(backdoor={"start": 0})}, "terms.backdoor.start: must be >= 1, the epoch before it builds"),
        ({**TEACHER, **terms(backdoor={"mix": 1})}, "terms.backdoor.mix: must lie in [0, 1), got 1"),
        ({**TEACHER, **terms(backdoor={"temperature": 0})}, "terms.backdoor.temperature: must be a number > 0, got 0"),
        ({**TEACHER, **terms(kd={"temperature": -1})}, "terms.kd.temperature: must be a number > 0, got -1"),
        ({"terms": {"supervised": {"label_smoothing": 1}}}, "supervised.label_smoothing: must lie in [0, 1), got 1"),
        (
            {"terms": {"supervised": {"label_smoothing": -0.1}}},
            "supervised.label_smoothing: must lie in [0, 1), got -0.1",
        ),
        (terms(guide={"steps": 4}), "terms.guide.steps: only for integrated_gradients, got attribution left out"),
        (
            terms(guide={"attribution": "integrated_gradients", "steps": 0}),
            "terms.guide.steps: must be >= 1, got 0",
        ),
        (terms(kd={}), "teacher: is needed by terms.kd"),
        (terms(backdoor={"start": 1}), "teacher: is needed by terms.backdoor"),
        ({"transplant": {}}, "teacher: is needed by transplant"),
        (TEACHER, "teacher: nothing uses it; none of the terms match, kd, sample, relation, backdoor, explain, and no"),
        ({**TEACHER, "terms": {"match": {}}}, "terms.match: needs transplant, whose projector gives the maps"),
        (
            {"student": {"name": "bcos/resnet18", "input": {"mean": [0.5, 0.5, 0.5]}}},
            "student.input.mean: not for bcos/resnet18: B-cos networks read pixels in 0..1 with their inverses",
        ),
        ({"student": {"name": "small/4", "input": {"size": 0}}}, "student.input.size: must be >= 1, got 0"),
        (
            {"student": {"name": "small/4", "input": {"mean": [123.7, 116.3, 103.5]}}},
            "student.input.mean: must be three numbers in [0, 1], of red, green and blue pixels in 0..1, got [123.7",
        ),
        (
            {**KD, "teacher": {"name": "a", "weights": "x", "input": {"std": [0.5]}}},
            "teacher.input.std: must be three numbers in [0, 1], of red, green and blue pixels in 0..1, got [0.5]",
        ),
        (
            {"student": {"name": "small/4", "input": {"std": [0.5, 0.0, 0.5]}}},
            "student.input.std: must be three numbers > 0, got [0.5, 0.0, 0.5]",
        ),
        (
            {"student": {"name": "small/4", "input": {"interpolation": "lanczos"}}},
            "student.input.interpolation: must be one of 'nearest', 'bilinear', 'bicubic'",
        ),
        ({"student": {"name": "small/4", "input": {"means": [0.5]}}}, "student.input.means: no such key"),
        (
            {"terms": {"kd": {}}, "teacher": {"name": "a", "weights": "x", "pretrained": True}},
            "teacher.pretrained, teacher.weights: only one of them can be begun from",
        ),
        ({"terms": {"kd": {}}, "teacher": {"name": "a"}}, "teacher: method checkpoint needs weights or pretrained"),
        (taught(weights="x"), "teacher.schedule: method checkpoint trains nothing"),
        (taught(method="erm", schedule=None), "teacher.schedule: is needed by method erm"),
        (taught(method="erm", up=2), "teacher.up: only for method jtt, got erm"),
        (taught(method="dfr", step_size=2), "teacher.step_size: only for method group_dro, got dfr"),
        (taught(method="erm", identification_epochs=2), "teacher.identification_epochs: only for method jtt, got erm"),
        (taught(method="jtt"), "teacher.up: is needed by method jtt"),
        (taught(method="jtt", up=0), "teacher.up: must be a number > 0, got 0"),
        (taught(method="jtt", up=2, identification_epochs=0), "teacher.identification_epochs: must be >= 1, got 0"),
        (taught(method="group_dro", step_size=0), "teacher.step_size: must be a number > 0, got 0"),
        (taught(method="erm", views=2), "teacher.views: must be >= 1, and is for teacher.cache alone; got 2"),
        (taught(method="erm", cache="fp32", views=0), "teacher.views: must be >= 1, and is for teacher.cache alone"),
        (taught(method="erm", schedule={"epochs": 0}), "teacher.schedule.epochs: must be >= 1, got 0"),
        ({"terms": {"supervised": {"weighted": True}}}, "terms.supervised.weighted: there are no weights"),
        ({**TEACHER, "terms": {"kd": {"weighted": True}}}, "terms.kd.weighted: there are no weights"),
        (
            {"weights": {}},
            "weights: no term uses them; of terms supervised, match, kd, sample, backdoor, explain can, with weighted:",
        ),
        ({**MATCH, "terms": {"match": {"weighted": False}}, "weights": {}}, "weights: no term uses them; of terms"),
        ({**MATCH, "weights": {"method": "groups", "up": 3}}, "weights.up: only for method errors, got groups"),
        ({**MATCH, "weights": {"method": "groups", "epochs": 3}}, "weights.epochs: only for method errors, got groups"),
        (
            {**MATCH, "weights": {"method": "groups", "convention": "copies"}},
            "weights.convention: only for method errors, got groups",
        ),
        ({**MATCH, "weights": {"up": 0}}, "weights.up: must be a number > 0, got 0"),
        (
            {**MATCH, "weights": {"up": 1.5, "convention": "copies"}},
            "weights.up: must be a whole number of copies, got 1.5",
        ),
        ({**MATCH, "weights": {"epochs": 0}}, "weights.epochs: must be >= 1, got 0"),
        (
            {"selection": {"rule": "pareto", "attributions": False}},
            "selection.attributions: rule pareto compares EPG and IoU, which are made of them; got False",
        ),
        (
            {**MATCH, "terms": {"match": {"weighted": False}}, "weights": {"draw": True}},
            "weights: no term uses them; of",
        ),
        (
            {"schedule": {"ema_warmup": False}},
            "schedule.ema_warmup: only for schedule.ema, which is left out; got False",
        ),
        ({"schedule": {"epochs": 0}}, "schedule.epochs: must be >= 1, got 0"),
        ({"schedule": {"batch": 0}}, "schedule.batch: must be >= 1, got 0"),
        ({"schedule": {"accumulate": 0}}, "schedule.accumulate: must be >= 1, got 0"),
        ({"schedule": {"batch": 9, "accumulate": 2}}, "schedule.batch: must be a multiple of accumulate=2, got 9"),
        ({"schedule": {"learning_rate": 0}}, "schedule.learning_rate: must be a number > 0, got 0"),
        ({"schedule": {"learning_rate": float("inf")}}, "schedule.learning_rate: must be a number > 0, got inf"),
        ({"schedule": {"weight_decay": -1}}, "schedule.weight_decay: must be a number >= 0, got -1"),
        ({"schedule": {"warmup": -1}}, "schedule.warmup: must be a number >= 0, got -1"),
        ({"schedule": {"clip": 0}}, "schedule.clip: must be a number > 0, got 0"),
        ({"schedule": {"ema": 1}}, "schedule.ema: must lie in (0, 1), got 1"),
        ({"schedule": {"ema": 0}}, "schedule.ema: must lie in (0, 1), got 0"),
        ({"schedule": {"shape": "steps"}}, "schedule.milestones: for shape steps and only for it, got None with steps"),
        ({"schedule": {"shape": "steps", "milestones": []}}, "schedule.milestones: must be epochs >= 1, got []"),
        ({"schedule": {"shape": "steps", "milestones": [0]}}, "schedule.milestones: must be epochs >= 1, got [0]"),
        ({"schedule": {"milestones": [1]}}, "schedule.milestones: for shape steps and only for it, got [1] with const"),
        ({"pretraining": {"batch": 0}}, "pretraining.batch: must be >= 1, got 0"),
        ({"student": {"name": "a", "pretrained": True, "weights": "x"}}, "student.pretrained, student.weights: only"),
        (
            {**terms(guide={}), "compute": {"compile": True}},
            "compute.compile: PyTorch cannot differentiate a compiled student twice, as terms.guide has to",
        ),
        ({**MATCH, "pretraining": {}}, "pretraining: a transplanted student has no classifier of its own"),
    ],
)
def test_what_does_not_fit_together(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    refused(written(tmp_path, {**PLAIN, **change}), (), message)


@pytest.mark.parametrize(
    "change",
    [
        {},
        KD,
        {**MATCH, "weights": {}},
        {**MATCH, "weights": {"method": "groups"}},
        {**TEACHER, "transplant": {}},
        {"terms": {"supervised": {"weighted": True}}, "weights": {"convention": "copies", "up": 3.0}},
        {**TEACHER, **terms(backdoor={"start": 1})},
        {"data": {"path": "x", "annotated_fraction": 0.5, "dilate": 0.1}, **terms(guide={})},
        {"schedule": {"shape": "steps", "milestones": [2]}, "pretraining": {}},
        taught(method="jtt", up=3, identification_epochs=2),
    ],
)
def test_what_does_fit_together(tmp_path: Path, change: dict[str, Any]) -> None:
    assert read(written(tmp_path, {**PLAIN, **change}))
