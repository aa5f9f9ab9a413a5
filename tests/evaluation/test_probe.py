"""Linear probes on frozen features: what they read, and of which images."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("sklearn")

import data_trees as trees
import training_runs as runs

from debiaskd.cli import entry as cli
from debiaskd.data import PackedDataset, prepare
from debiaskd.evaluation import probe as probing
from debiaskd.evaluation.evaluate import LoadedStage
from debiaskd.evaluation.probe import probe_run
from debiaskd.recipe import RecipeError

pytestmark = pytest.mark.xdist_group("probing")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = runs.birds(tmp_path_factory.mktemp("birds"))
    document = {
        "student": {"name": "plain/8"},
        "schedule": {"epochs": 1, "batch": 12, "learning_rate": 1e-3},
        "terms": {"supervised": {}},
        "compute": {"accelerator": "cpu"},
    }
    runs.train(runs.write(data.parent / "recipe.yaml", data, document), data.parent / "run")
    return data.parent / "run"


def test_a_probe_reads_the_frozen_features(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.linear_model import LogisticRegression

    given: list[np.ndarray] = []
    inner = probing._single_label

    def noted(fitted: np.ndarray, target: np.ndarray, measured: np.ndarray, expected: np.ndarray) -> Any:
        given.extend([fitted, measured])
        return inner(fitted, target, measured, expected)

    monkeypatch.setattr(probing, "_single_label", noted)

    data = run.parent / "birds16"
    before = (run / "student" / "model.safetensors").read_bytes()
    document, path = probe_run(run, "student", str(data), ("train", "test"))
    assert json.loads(path.read_text()) == document
    assert document["pictures"] == [48, 16] and document["features"] == 8
    assert (run / "student" / "model.safetensors").read_bytes() == before
    loaded = LoadedStage(run)
    features, targets = [], []
    for split in ("train", "test"):
        batch = PackedDataset(data, split).__getitems__(range(48 if split == "train" else 16))
        images = (batch.images.double() / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
            [0.229, 0.224, 0.225]
        )[:, None, None]
        with torch.no_grad():
            features.append(loaded.model.forward_features(images.float()).mean((2, 3)).double().numpy())
        targets.append(batch.target.numpy())
    mean, deviation = features[0].mean(0), features[0].std(0) + 1e-6  # of the images to fit on alone
    for found, expected in zip(given, features):
        np.testing.assert_allclose(found, (expected - mean) / deviation, rtol=1e-3, atol=1e-3)
    solver = LogisticRegression(C=document["strength"], max_iter=1000)
    solver.fit((features[0] - mean) / deviation, targets[0])
    right = (solver.predict((features[1] - mean) / deviation) == targets[1]).mean()
    assert document["figures"]["accuracy"] == pytest.approx(right)


def test_several_labels_a_picture(run: Path, tmp_path: Path) -> None:
    objects = [
        "".join(trees.voc_object(name, (1, 1, 9, 9)) for name in names)
        for names in (["dog"], ["cat", "dog"], ["cat"]) * 8
    ]
    prepare("voc", trees.voc(tmp_path, objects), tmp_path / "voc16", size=16, workers=1)
    document, _ = probe_run(run, "student", str(tmp_path / "voc16"), ("train[:70%]", "train[70%:]"))
    assert set(document["figures"]) == {"f1", "map", "map_classes"}
    assert all(0 <= document["figures"][name] <= 1 for name in ("f1", "map"))
    assert document["figures"]["map_classes"] == 2


@pytest.mark.parametrize("several", [False, True])
def test_the_strength_is_chosen_on_pictures_held_back(monkeypatch: pytest.MonkeyPatch, several: bool) -> None:
    generator = np.random.default_rng(0)
    target = (np.arange(60) % 4 == 0).astype(np.int64)
    feature = np.stack([target + generator.normal(0, 0.3, 60), np.arange(60) / 1e9], 1)  # and their numbers
    if several:
        target = np.stack([target, 1 - target], 1)
    seen: list[tuple[float, list[int]]] = []
    inner = probing._solver

    def noted(strength: float, feature: np.ndarray, target: np.ndarray) -> Any:
        seen.append((strength, sorted(np.round(feature[:, 1] * 1e9).astype(int).tolist())))
        return inner(strength, feature, target)

    monkeypatch.setattr(probing, "_solver", noted)
    judge, share = (probing._multi_label, "f1") if several else (probing._single_label, "accuracy")
    figures, chosen = judge(feature, target, feature, target)
    tried, last = [one for one in seen if len(one[1]) < 60], [one for one in seen if len(one[1]) == 60]
    assert [strength for strength, _ in tried[:: 2 if several else 1]] == list(probing.STRENGTHS)
    ((rest,),) = [{tuple(rows) for _, rows in tried}]
    held = sorted(set(range(60)) - set(rest))
    assert (len(rest), len(held)) == (48, 12) and {strength for strength, _ in last} == {chosen}

    def worth(strength: float, fit: Any, measured: Any) -> float:
        if several:
            scores = probing._scores(strength, feature[fit], target[fit], feature[measured])
            return probing._f1(scores, target[measured])
        solver = inner(strength, feature[fit], target[fit])
        return float((solver.predict(feature[measured]) == target[measured]).mean())

    known = {strength: worth(strength, list(rest), held) for strength in probing.STRENGTHS}
    assert known[chosen] == max(known.values()) > min(known.values())
    assert figures[share] == pytest.approx(worth(chosen, slice(None), slice(None)))


def test_scores_of_classes_that_nothing_or_everything_shows() -> None:
    feature = np.array([[0.0], [1.0], [2.0], [3.0]])
    target = np.array([[0, 0, 1], [0, 0, 1], [0, 1, 1], [0, 1, 1]])
    scores = probing._scores(1.0, feature, target, np.array([[0.0], [3.0]]))
    assert (scores[:, 0] == -np.inf).all() and (scores[:, 2] == np.inf).all()
    assert scores[0, 1] < 0 < scores[1, 1]
    expected = np.array([[0, 0, 1], [1, 1, 1]])
    assert probing._f1(scores, expected) == pytest.approx(2 * 3 / (3 + 4))
    assert probing._map(scores, expected) == pytest.approx((0.5 + 1 + 1) / 3)
    assert probing._map(scores[:, :2], expected[:, [1, 0]] * [[0, 1]]) == 1, "of the one class that is shown"
    assert math.isnan(probing._map(scores, 0 * expected)) and math.isnan(probing._f1(scores[:1, :2], expected[:1, :2]))


def test_pictures_to_fit_on_are_not_those_to_measure_on(run: Path) -> None:
    data = str(run.parent / "birds16")
    with pytest.raises(RecipeError, match=r"train\[:60%\] and train\[40%:\] must not share images"):
        probe_run(run, "student", data, ("train[:60%]", "train[40%:]"))


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(run.parent / "birds16")
    assert cli.main(["evaluate", str(run), "--probe", data, "--probe-splits", "train", "val"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert (
        out[0].startswith("linear probe on 8 frozen features of ") and "fitted on 48, measured on 16 images" in out[0]
    )
    assert out[1].split()[0] == "accuracy" and out[-1] == str(run / "probe-birds16.json")
    assert cli.main(["evaluate", str(run), "--probe", data, "--split", "val"]) == 2
    assert "--split: is not for --probe" in capsys.readouterr().err
    assert cli.main(["evaluate", str(run), "--probe", str(run.parent / "nowhere")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
