"""`transplant.init: least_squares`: the student starts at the minimum of its match loss."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs as runs
import yaml
from safetensors.torch import load_file

from debiaskd.recipe import RecipeError, read

RECIPE: dict[str, Any] = {
    "data": {"flip": True},
    "teacher": {
        "name": "plain/8",
        "method": "group_dro",
        "schedule": {"epochs": 1, "batch": 12, "learning_rate": 1e-3},
    },
    "student": {"name": "plain/6"},
    "transplant": {"projector": "linear", "init": "least_squares"},
    "weights": {"method": "errors", "up": 20, "epochs": 1},
    "schedule": {"epochs": 1, "batch": 12, "learning_rate": 1e-9, "weight_decay": 0.0},
    "terms": {"match": {}},
    "compute": {"accelerator": "cpu"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("data"))


def train(folder: Path, data: Path, **changes: Any) -> Any:
    document = copy.deepcopy(RECIPE)
    for section, values in changes.items():
        document[section] = {**document.get(section, {}), **values}
    return runs.train(runs.write(folder.with_suffix(".yaml"), data, document), folder)


def test_the_students_projector_is_the_fitted_one(data: Path, tmp_path: Path) -> None:
    student = train(tmp_path / "run", data)
    fitted = load_file(tmp_path / "run" / "projector" / "projector.safetensors")
    trained = load_file(student.model)
    torch.testing.assert_close(trained["projector.weight"], fitted["weight"], rtol=0, atol=1e-6)
    facts = json.loads((tmp_path / "run" / "projector" / "stage.json").read_text())["facts"]
    assert 0 < facts["explained"] <= 1 and facts["pictures"] == 48

    # The loss of the first step is less than that of a random projector, with live and with cached outputs alike.
    cached = train(tmp_path / "cached", data, teacher={"cache": "fp32", "views": 2})
    torch.testing.assert_close(load_file(cached.model)["projector.weight"], fitted["weight"], rtol=1e-4, atol=1e-5)
    train(tmp_path / "random", data, transplant={"init": "random"})
    first = [(tmp_path / run / "student" / "log.csv").read_text().splitlines() for run in ("run", "random")]
    losses = [float(dict(zip(rows[0].split(","), rows[1].split(",")))["match"]) for rows in first]
    assert losses[0] < 0.7 * losses[1]
    assert not (tmp_path / "random" / "projector").exists()


def test_other_sample_weights_fit_another_projector(data: Path, tmp_path: Path) -> None:
    found = {}
    kd = {"weighted": True, "weight": 0.01}
    for name, weights, terms in (
        ("errors", {}, {}),
        ("drawn", {"draw": True}, {}),
        ("alike", {}, {"match": {"weighted": False}, "kd": kd}),
    ):
        train(tmp_path / name, data, weights=weights, terms=terms)
        found[name] = load_file(tmp_path / name / "projector" / "projector.safetensors")["weight"]
    torch.testing.assert_close(found["drawn"], found["errors"], rtol=0, atol=0)
    assert (found["alike"] - found["errors"]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transplant": {"projector": "depthwise"}}, "transplant.init: least_squares needs projector linear"),
        ({"terms": {"match": None, "kd": {}}}, "transplant.init: least_squares fits the maps that terms.match"),
    ],
)
def test_what_has_no_closed_form_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    document = copy.deepcopy(RECIPE) | {"weights": None}
    document = {k: v for k, v in document.items() if v is not None}
    for section, values in changes.items():
        merged = {**document[section], **values}
        document[section] = {k: v for k, v in merged.items() if v is not None}
    document["data"] = {"path": str(tmp_path)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(RecipeError, match=message):
        read(tmp_path / "recipe.yaml")
