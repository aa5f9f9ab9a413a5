"""recipes/unknown_bias.yaml: the whole chain, in which no annotation of the bias is read."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import data_trees as trees
import training_runs as runs

from debiaskd.data import prepare
from debiaskd.evaluation.evaluate import evaluate_run

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("stages")]
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "unknown_bias.yaml"
SMALL = {
    "data.crop_scale": [0.7, 1.0],
    "teacher.name": "plain/8",
    "teacher.pretrained": False,
    "teacher.schedule": {"epochs": 2, "batch": 8, "learning_rate": 1e-2},
    "student.name": "plain/4",
    "student.pretrained": False,
    "schedule": {"epochs": 2, "batch": 8, "learning_rate": 1e-2},
    "compute.accelerator": "cpu",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder of 40, 16 and 8 images of two classes, and the bias of each."""
    root, biases = tmp_path_factory.mktemp("unknown") / "birds", {}
    for split, count in (("train", 20), ("val", 8), ("test", 4)):
        for k, name in enumerate(("gull", "tern")):
            for i in range(count):
                trees.picture(root / split / name / f"{i}.png", seed=100 * k + i)
                biases[f"{split}/{name}/{i}.png"] = "land" if (i % 4 == 0) == (k == 0) else "water"
    return root, biases


def prepared(root: Path, out: Path, biases: dict[str, str] | None) -> Path:
    file = None
    if biases is not None:
        file = out.parent / f"{out.name}.csv"
        file.write_text("path,bias\n" + "".join(f"{name},{bias}\n" for name, bias in biases.items()))
    prepare("folder", root, out, size=16, workers=1, bias=file)
    return out


def made(run: Path) -> dict[str, bytes]:
    files = ("groups/groups.safetensors", "groups/bias.csv", "teacher/model.safetensors", "student/model.safetensors")
    return {name: (run / name).read_bytes() for name in files}


@pytest.mark.parametrize("method", ("afr", "group_dro"))
def test_without_its_annotation_and_with_another_the_same_bytes(
    pictures: tuple[Path, dict[str, str]], tmp_path: Path, method: str
) -> None:
    root, biases = pictures
    names, shuffled = list(biases), list(biases.values())
    random.Random(0).shuffle(shuffled)
    variants = {"annotated": biases, "permuted": dict(zip(names, shuffled)), "deleted": None}
    found = {}
    for name, annotation in variants.items():
        data, run = prepared(root, tmp_path / name, annotation), tmp_path / f"{name}-run"
        overrides: dict[str, Any] = {**SMALL, "data.path": str(data), "teacher.method": method}
        typed = [f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in overrides.items()]
        runs.train(RECIPE, run, *typed)
        found[name] = made(run)
    assert found["annotated"] == found["permuted"] == found["deleted"]
    facts = json.loads((tmp_path / "annotated-run" / "student" / "stage.json").read_text())["facts"]
    assert facts["rule"] == "worst_environment" and "found, not known" in facts["selection"]
    # What it is worth is told by the annotation, which the test keeps.
    document, _ = evaluate_run(tmp_path / "annotated-run", "student", None, None)
    assert document["groups"] == ["gull, land", "gull, water", "tern, land", "tern, water"]
    assert "worst_group_accuracy" in document["figures"]
