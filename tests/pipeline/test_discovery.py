"""Groups that a recipe finds, or reads from a file: who uses them, and that no annotation is read."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

import training_runs as runs

from debiaskd import bias
from debiaskd.data import PackedDataset
from debiaskd.data.group_files import image_names, read_groups
from debiaskd.data.sources.problems import DataError
from debiaskd.pipeline.stages import Pipeline
from debiaskd.recipe import Data, RecipeError
from debiaskd.training.batches import open_split
from debiaskd.training.run import finished

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("stages")]
FAST = {"epochs": 2, "batch": 12, "learning_rate": 1e-2}
KD: dict[str, Any] = {
    "teacher": {"name": "plain/6", "method": "group_dro", "schedule": FAST},
    "student": {"name": "plain/4"},
    "schedule": FAST,
    "terms": {"kd": {}},
    "compute": {"accelerator": "cpu"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("discovery"))


def trained(folder: Path, path: Path, **document: Any) -> Any:
    folder.mkdir(exist_ok=True)
    return runs.train(runs.write(folder / "r.yaml", path, {**KD, **document}), folder / "run")


def write_csv(path: Path, rows: dict[str, str]) -> Path:
    path.write_text("path,bias\n" + "".join(f"{name},{bias}\n" for name, bias in rows.items()))
    return path


@pytest.mark.parametrize("method", ("environments", "clusters"))
def test_found_groups_train_the_teacher_and_select(data: Path, tmp_path: Path, method: str) -> None:
    options = {"method": method} | ({"smallest": 2, "most": 3} if method == "clusters" else {})
    student = trained(tmp_path, data, data={"groups": "found"}, discovery=options)
    assert student.facts["rule"] == "worst_environment", "found groups select by themselves"
    assert "worst_group_accuracy" not in student.facts["figures"], "what was found is not called known"
    names = student.facts["training_groups"]
    assert all("found-" in name for name in names) and sum(names.values()) == 48
    facts = finished(tmp_path / "run", "groups").facts
    assert sum(facts["train"]["sizes"].values()) == 48 and "against_known" not in facts["train"]
    # The teacher's group DRO had as many groups as there are found ones.
    assert len(names) == 2 * (2 if method == "environments" else 3)
    rows = list(csv.DictReader((tmp_path / "run" / "groups" / "bias.csv").read_text().splitlines()))
    assert len(rows) == 64 and set(rows[0]) == {"path", "bias", "class", "confidence"}
    # The file, read by another recipe, gives the same groups; so does a run that goes on.
    split = open_split(Data(str(data), groups=str(tmp_path / "run" / "groups" / "bias.csv")), "train")
    assert split.groups is not None and split.environments is not None
    biases = len(split.whole.groups) // 2
    counts = {f"{label}, found-{c}": 0 for label in split.whole.classes for c in range(len(names) // 2)}
    counts |= dict(zip(split.whole.groups, split.groups.bincount(minlength=2 * biases).tolist()))
    assert {name: count for name, count in counts.items() if count} == {n: c for n, c in names.items() if c}
    again = trained(tmp_path, data, data={"groups": "found"}, discovery=options)
    assert again.fingerprint == student.fingerprint


def test_selection_by_environments_tells_what_it_lost(data: Path, tmp_path: Path) -> None:
    rule = {"rule": "worst_environment"}
    student = trained(tmp_path, data, discovery={"epochs": 2}, selection=rule, schedule={**FAST, "epochs": 4})
    facts, against = student.facts, student.facts["against_worst_group"]
    assert facts["rule"] == "worst_environment" and facts["figures"]["worst_group_accuracy"] == against["chosen"]
    assert against["lost"] == pytest.approx(against["worst_group_accuracy"] - against["chosen"])
    assert against["lost"] >= 0
    assert not any("found" in name for name in facts["training_groups"]), "training keeps the known groups"
    assert "against_known" in finished(tmp_path / "run", "groups").facts["train"]


def test_split_without_groups(data: Path) -> None:
    split = open_split(Data(str(data), groups="none"), "train")
    assert split.groups is None and split.whole.__getitems__([0]).groups is None
    assert open_split(Data(str(data), groups="none"), "test").groups is not None


def test_groups_of_a_file(data: Path, tmp_path: Path) -> None:
    whole = PackedDataset(data, "train")
    names = image_names(whole)
    assert names[0] == f"train/{whole.paths()[0]}"
    found = {name: ("found-1" if i < 10 else "found-0") for i, name in enumerate(names)}
    groups, called = read_groups(whole, write_csv(tmp_path / "a.csv", found))
    assert groups is not None and called == bias.found_names(whole.classes, 2)
    assert groups.tolist() == (2 * whole.target + (torch.arange(48) < 10).long()).tolist()
    bare = {name.removeprefix("train/"): cluster for name, cluster in found.items()}
    assert torch.equal(read_groups(whole, write_csv(tmp_path / "b.csv", bare))[0], groups)
    validation = PackedDataset(data, "val")
    assert read_groups(validation, tmp_path / "a.csv")[0] is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("path,bias\ntrain/a,x\n", "must have two biases or more, got x"),
        ("path,bias\ntrain/a,x\ntrain/a,y\n", "line 3: train/a has bias 'y', and 'x' in an earlier line"),
        ("path,bias\ntrain/a,\n", "line 2: bias must be a name, got nothing"),
        ("path,bias\ntrain/birds/0.jpg,x\ntrain/b,y\n", "each of the 48 images of train, 47 have none, such as train"),
        (None, "no such file; groups must be a CSV file"),
    ],
)
def test_bad_files_of_groups(data: Path, tmp_path: Path, rows: str | None, message: str) -> None:
    if rows is not None:
        (tmp_path / "g.csv").write_text(rows)
    with pytest.raises(DataError, match=message):
        read_groups(PackedDataset(data, "train"), tmp_path / "g.csv")
    with pytest.raises(RecipeError, match=r"data\.groups"):
        open_split(Data(str(data), groups=str(tmp_path / "g.csv")), "train")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"data": {"groups": "found"}}, "data.groups: found needs discovery"),
        ({"discovery": {"most": 3}}, "discovery.most: only for method clusters, got environments"),
        ({"discovery": {"epochs": 0}}, "discovery.epochs: must be >= 1, got 0"),
        ({"discovery": {}, "data": {"groups": "b.csv"}}, "b.csv names groups that are known already"),
        ({"selection": {"rule": "worst_environment"}}, "worst_environment needs worst_environment_accuracy, .* `disc"),
        ({"data": {"groups": "none"}}, "data.path: groups are asked for"),
    ],
)
def test_recipes_that_do_not_fit(data: Path, tmp_path: Path, document: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read = runs.read(runs.write(tmp_path / "r.yaml", data, {**KD, **document}))
        Pipeline(read, tmp_path / "run", runs.launch(read.compute), lambda *news: None)
