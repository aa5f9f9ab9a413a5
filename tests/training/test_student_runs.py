"""Options of a training at toy size: selection, parts of splits, averages, accumulation, precision, networks."""

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

import data_trees as trees
import numpy as np
import training_runs as runs
from safetensors.torch import load_file
from training_runs import PLAIN

from debiaskd.data import prepare
from debiaskd.evaluation.evaluate import LoadedStage
from debiaskd.recipe import Data, RecipeError
from debiaskd.training.batches import open_split

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("student_runs")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that show a cat, a dog, both or none, each with its box."""
    root = tmp_path_factory.mktemp("several")
    cat, dog = trees.voc_object("cat", (3, 3, 20, 20)), trees.voc_object("dog", (15, 10, 38, 28))
    shown = [cat, dog, cat + dog, ""]
    for split, count in (("train", 16), ("val", 8), ("test", 8)):
        trees.voc(root / split, [shown[i % 4] for i in range(count)], split=split)
    merged = root / "train" / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    for split in ("val", "test"):
        names = (root / split / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / f"{split}.txt").read_text()
        (merged / f"{split}.txt").write_text(names)
    prepare("voc", root / "train", root / "out", size=16, workers=1)
    return root / "out"


def run(data: Path, folder: Path, document: dict[str, Any] = PLAIN, *overrides: str) -> Any:
    folder.mkdir(exist_ok=True)
    return runs.train(runs.write(folder / "recipe.yaml", data, document), folder / "run", *overrides)


def epochs(folder: Path) -> list[dict[str, str]]:
    with open(folder / "run" / "student" / "epochs.csv") as file:
        return list(csv.DictReader(file))


# -- selection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "figure"),
    [("accuracy", "accuracy"), ("worst_group", "worst_group_accuracy"), (None, "worst_group_accuracy"), ("last", "")],
)
def test_the_epoch_that_validation_likes_best_is_kept(
    data: Path, tmp_path: Path, rule: str | None, figure: str
) -> None:
    stage = run(data, tmp_path, {**PLAIN, "selection": {"rule": rule}}, "--schedule.epochs", "5")
    rows = epochs(tmp_path)
    values = [float(row[figure]) if figure else float(row["epoch"]) for row in rows]
    assert stage.facts["epoch"] == max(range(5), key=lambda epoch: (values[epoch], epoch))  # the later of equals
    assert stage.facts["rule"] == (rule or "worst_group")
    for name, value in stage.facts["figures"].items():
        assert value is None or value == float(rows[stage.facts["epoch"]][name])
    kept = tmp_path / "run" / "student" / "kept" / f"epoch-{stage.facts['epoch']:04d}.safetensors"
    assert stage.model.read_bytes() == kept.read_bytes()


def test_validation_every_so_often(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, {**PLAIN, "selection": {"every": 3}}, "--schedule.epochs", "5")
    assert [row["epoch"] for row in epochs(tmp_path)] == ["2", "4"]


def test_a_front_is_kept_whole(data: Path, tmp_path: Path) -> None:
    document = {**PLAIN, "terms": {"supervised": {}, "guide": {"weight": 0.1}}, "selection": {"rule": "pareto"}}
    stage = run(data, tmp_path, document, "--schedule.epochs", "4")
    kept = sorted(path.stem for path in (tmp_path / "run" / "student" / "kept").iterdir())
    assert kept == [f"epoch-{epoch:04d}" for epoch in sorted(stage.facts["front"])]
    rows = [tuple(float(row[name]) for name in ("accuracy", "epg", "iou")) for row in epochs(tmp_path)]
    assert stage.facts["epoch"] in stage.facts["front"]
    beaten = [i for i, a in enumerate(rows) if any(all(y > x + 0.005 for x, y in zip(a, b)) for b in rows)]
    assert not set(beaten) & set(stage.facts["front"])


def test_nothing_looks_at_the_test_pictures(tmp_path: Path) -> None:
    """With other labels and pixels there, the outcome is the same bit for bit."""
    outcomes = []
    for number in range(2):
        data = runs.birds(tmp_path / f"data{number}")
        if number:
            spoil(data)
        folder = tmp_path / f"run{number}"
        run(data, folder, {**PLAIN, "terms": {"supervised": {"weighted": True}}, "weights": {"method": "groups"}})
        found = folder / "run" / "student"
        outcomes.append([(found / name).read_bytes() for name in ("model.safetensors", "epochs.csv", "log.csv")])
    assert outcomes[0] == outcomes[1]


def spoil(data: Path) -> None:
    changed = 0
    for path in sorted((data / "test").rglob("*.npy")):
        content = np.load(path)
        if content.dtype == np.int64 and "target" in path.name:
            content = 1 - content
        elif content.dtype == np.uint8:
            content = 255 - content
        else:
            continue
        np.save(path, content)
        changed += 1
    assert changed >= 1


# -- data -------------------------------------------------------------------------------------------------------------


def test_parts_of_a_split_are_disjoint_and_stable(data: Path) -> None:
    def numbers(part: str, seed: int = 0) -> list[int]:
        return open_split(Data(path=str(data), train=part, seed=seed), "train").numbers.tolist()

    first, second, whole = numbers("train[:50%]"), numbers("train[50%:]"), numbers("train")
    assert len(first) == len(second) == 24 and sorted(first + second) == whole == list(range(48))
    assert first == sorted(first) != list(range(24))
    assert first == numbers("train[:50%]") != numbers("train[:50%]", seed=1)
    assert sorted(numbers("train[25%:50%]") + numbers("train[:25%]")) == first
    assert numbers("train[0%:100%]") == whole
    split = open_split(Data(path=str(data), train="train[:50%]"), "train")
    batch = split.dataset.__getitems__([0, 5])
    assert batch.index.tolist() == [first[0], first[5]]
    assert batch.target.tolist() == split.target[[0, 5]].tolist()
    assert split.groups is not None and batch.groups.tolist() == split.groups[[0, 5]].tolist()


def test_pictures_that_show_several_classes(several: Path, tmp_path: Path) -> None:
    document = {
        **PLAIN,
        "schedule": {"epochs": 3, "batch": 4, "learning_rate": 1e-2},
        "teacher": {"name": "plain/6", "method": "erm", "schedule": {"epochs": 1, "batch": 4}},
        "terms": {"supervised": {}, "sample": {}, "guide": {"weight": 0.1, "layer": "Input"}},
    }
    stage = run(several, tmp_path, document)
    assert stage.facts["rule"] == "pareto" and set(stage.facts["figures"]) >= {"f1", "map", "epg", "iou"}
    assert "accuracy" not in stage.facts["figures"]
    figures = run(several, tmp_path / "f1", {**PLAIN, "schedule": {"epochs": 1, "batch": 4}}).facts
    assert figures["rule"] == "f1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"terms": {"kd": {}}}, "terms.kd: needs one class an image"),
        ({"terms": {"relation": {}}}, "terms.relation: needs one class an image"),
        ({"terms": {"sample": {}, "backdoor": {"start": 1}}}, "terms.backdoor: needs one class an image"),
        (
            {"terms": {"sample": {}, "supervised": {"weighted": True}}, "weights": {}},
            "weights.method: errors needs one cl",
        ),
        (
            {"terms": {"sample": {}, "supervised": {"label_smoothing": 0.1}}},
            "terms.supervised.label_smoothing: needs one",
        ),
        ({"data": {"mixup": 0.2}}, "data.mixup: needs one class an image"),
        ({"teacher": {"method": "jtt", "up": 2}}, "teacher.method: jtt needs one class an image"),
        ({"teacher": {"method": "group_dro"}}, "data.path: groups are asked for, and the prepared data has none"),
        ({"selection": {"rule": "accuracy"}}, "selection.rule: accuracy needs accuracy, and the validation images"),
    ],
)
def test_what_several_classes_do_not_allow(several: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    teacher = {"name": "plain/6", "method": "erm", "schedule": {"epochs": 1, "batch": 4}, **change.get("teacher", {})}
    with pytest.raises(RecipeError, match=message):
        run(several, tmp_path, {**PLAIN, "terms": {"sample": {}}, **change, "teacher": teacher})


def test_guidance_needs_boxes(tmp_path: Path) -> None:
    trees.waterbirds(tmp_path / "b", boxes=False)
    prepare("waterbirds", tmp_path / "b", tmp_path / "out", size=16, workers=1)
    with pytest.raises(RecipeError, match=r"terms\.guide: the training images have no boxes"):
        run(tmp_path / "out", tmp_path / "r", {**PLAIN, "terms": {"supervised": {}, "guide": {}}})
    with pytest.raises(RecipeError, match=r"selection\.rule: pareto needs epg, and the validation images give acc"):
        run(tmp_path / "out", tmp_path / "r", {**PLAIN, "selection": {"rule": "pareto"}}, "--schedule.batch", "3")


# -- schedule and compute ---------------------------------------------------------------------------------------------


def test_accumulated_passes_are_one_larger_batch(data: Path, tmp_path: Path) -> None:
    document = {**PLAIN, "data": {"flip": False}, "compute": {"accelerator": "cpu", "log_every": 1}}
    once = run(data, tmp_path / "1", document)
    twice = run(data, tmp_path / "3", document, "--schedule.accumulate", "3")
    torch.testing.assert_close(load_file(twice.model), load_file(once.model), rtol=1e-4, atol=1e-5)
    logs = [(tmp_path / k / "run" / "student" / "log.csv").read_text().splitlines() for k in ("1", "3")]
    assert len(logs[0]) == len(logs[1]) == 1 + 8


def test_an_average_of_the_weights_is_what_is_kept(data: Path, tmp_path: Path) -> None:
    plain = load_file(run(data, tmp_path / "plain").model)
    averaged = load_file(
        run(data, tmp_path / "ema", {**PLAIN}, "--schedule.ema", "0.9999", "--schedule.ema_warmup", "false").model
    )
    warm = load_file(run(data, tmp_path / "warm", {**PLAIN}, "--schedule.ema", "0.9999").model)
    begun = run(data, tmp_path / "begun", {**PLAIN}, "--schedule.learning_rate", "1e-9")
    beginning = load_file(begun.model)
    for name in plain:  # so slow an average has hardly left the beginning
        torch.testing.assert_close(averaged[name], beginning[name], rtol=0, atol=1e-3)
    assert any((plain[name] - beginning[name]).abs().max() > 1e-2 for name in plain)
    moved, left = (sum(float((state[name] - beginning[name]).norm()) for name in plain) for state in (plain, warm))
    assert left > 0.5 * moved


def test_bfloat16_trains(data: Path, tmp_path: Path) -> None:
    full = run(data, tmp_path / "32")
    half = run(data, tmp_path / "bf16", PLAIN, "--compute.precision", "bf16")
    states = load_file(full.model), load_file(half.model)
    assert all(tensor.dtype == torch.float32 for tensor in states[1].values())
    assert not torch.equal(states[0]["fc.weight"], states[1]["fc.weight"])
    torch.testing.assert_close(*states, rtol=0, atol=0.05)


def test_every_term_trains_in_bfloat16(data: Path, tmp_path: Path) -> None:
    overrides = ["--compute.precision", "bf16", "--schedule.epochs", "3", "--schedule.warmup", "0"]
    with open(run(data, tmp_path, runs.EVERYTHING, *overrides).folder / "log.csv") as file:
        row = list(csv.DictReader(file))[-1]
    assert {"match", "kd", "sample", "relation", "backdoor", "guide"} <= set(row)
    assert all(float(value) == float(value) for value in row.values())


@pytest.mark.compiles
def test_a_compiled_student_trains_as_one_that_is_not(data: Path, tmp_path: Path) -> None:
    document = {
        **PLAIN,
        "teacher": {"name": "plain/6", "method": "erm", "schedule": {"epochs": 1, "batch": 12}},
        "terms": {"supervised": {}, "sample": {}},
        "schedule": {"epochs": 1, "batch": 12, "learning_rate": 1e-2},
    }
    plain = run(data, tmp_path / "plain", document)
    compiled = run(data, tmp_path / "compiled", document, "--compute.compile", "true")
    torch.testing.assert_close(load_file(compiled.model), load_file(plain.model), rtol=1e-3, atol=1e-4)


# -- networks ---------------------------------------------------------------------------------------------------------


def test_an_x_dnn_has_no_biases(data: Path, tmp_path: Path) -> None:
    document = {**PLAIN, "student": {"name": "small/4,6", "bias_free": True}}
    stage = run(data, tmp_path, document)
    assert not any("bias" in name or "running_mean" in name for name in load_file(stage.model))
    model, images = LoadedStage(tmp_path / "run").model, torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model(3 * images), 3 * model(images))


def test_a_torchvision_teacher_and_student(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    document = {
        **PLAIN,
        "data": {"size": 64},
        "teacher": {"name": "torchvision/resnet18", "method": "erm", "schedule": {"epochs": 1, "batch": 24}},
        "student": {"name": "torchvision/resnet18"},
        "terms": {"kd": {}, "sample": {}},
        "schedule": {"epochs": 1, "batch": 24},
    }
    run(data, tmp_path, document)
    loaded = LoadedStage(tmp_path / "run")
    assert loaded.size == (64, 64) and not any(module.training for module in loaded.model.modules())


def test_b_cos_networks_see_pictures_and_their_inverses(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("bcos")
    document = {
        **PLAIN,
        "student": {"name": "bcos/cifar10_resnet20"},
        "terms": {"supervised": {}, "guide": {"weight": 0.1, "attribution": "bcos", "layer": "Input"}},
        "schedule": {"epochs": 1, "batch": 24},
    }
    stage = run(data, tmp_path, document)
    loaded = LoadedStage(tmp_path / "run")
    assert loaded.contract.channels == 6 and stage.facts["figures"]["epg"] is not None
    assert loaded.model(torch.rand(1, 6, 16, 16)).shape == (1, 2)
