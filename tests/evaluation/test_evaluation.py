"""What evaluation judges: each label of an image by its own boxes, and nothing by areas that are to be ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("torchdata")

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")

import data_trees as trees
import training_runs as runs
from sklearn.metrics import average_precision_score

from debiaskd import Boxes
from debiaskd.attribution.guide import Guide
from debiaskd.data import Batch, PackedDataset, prepare
from debiaskd.evaluation.evaluate import evaluate_run
from debiaskd.metrics import box_size_bins, energy_pointing_game, group_accuracy, iou_with_boxes
from debiaskd.models import SmallNet
from debiaskd.recipe import Data, Network, Recipe, RecipeError, Teacher, Terms, Transplant
from debiaskd.terms import GuideOptions, Ranks
from debiaskd.training.batches import Split, SplitLoader, open_split
from debiaskd.training.validation import SIZES, Evaluator, attribution_options, attributions, available_metrics


def several(ignore: Boxes | None) -> Batch:
    """Three images: of classes 0 and 2, of class 1, and of none."""
    torch.manual_seed(0)
    target = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.uint8)
    boxes = Boxes.from_lists([[[0, 0, 8, 8], [4, 4, 12, 12]], [], []], [[0, 2], [], []])
    return Batch(torch.randn(3, 3, 16, 16), target, boxes, ignore=ignore)


def test_each_label_has_its_map_and_its_boxes() -> None:
    model = SmallNet((4, 6), (2, 2), num_classes=3).eval()
    batch, guide = several(None), Guide(model)
    (first, first_boxes, none), (second, second_boxes, _) = attributions(guide, batch)
    assert none is None
    every = guide.attribute(batch.images, torch.tensor([[0, 1, 2]] * 3))
    labels = {tuple(maps[0].flatten().tolist()) for maps in (first, second)}
    assert labels == {tuple(every[0, k].flatten().tolist()) for k in (0, 2)}
    torch.testing.assert_close(first[1], every[1, 1])
    assert first_boxes.annotated.tolist() == [True, True, False]
    assert second_boxes.annotated.tolist() == [True, False, False]
    covered = sorted(boxes.mask((16, 16))[0].sum().item() for boxes in (first_boxes, second_boxes))
    assert covered == [64, 64]
    own = first_boxes.mask((16, 16))[0] if torch.equal(first[0], every[0, 0]) else second_boxes.mask((16, 16))[0]
    assert own[0, 0] and not own[11, 11]


def test_a_class_of_which_everything_is_to_be_ignored_is_not_judged() -> None:
    model = SmallNet((4, 6), (2, 2), num_classes=3).eval()
    ignore = Boxes.from_lists([[[0, 0, 16, 4]], [[2, 2, 9, 9]], []], [[0], [1], []])
    first, second = attributions(Guide(model), several(ignore))
    assert first[1].annotated.tolist() == [True, False, False], "class 1 has an area to be ignored and no box"
    assert second[1].annotated.tolist() == [True, False, False]
    areas = sorted(found[2].mask((16, 16))[0].sum().item() for found in (first, second))
    assert areas == [0, 64], "of class 0 alone"


def test_one_label_a_picture() -> None:
    model = SmallNet((4, 6), (2, 2), num_classes=3).eval()
    boxes = Boxes.from_lists([[[0, 0, 8, 8]], None])
    batch = Batch(torch.randn(2, 3, 16, 16), torch.tensor([2, 0]), boxes)
    ((maps, found, ignore),) = attributions(Guide(model), batch)
    assert ignore is None and found.annotated.tolist() == [True, False]
    torch.testing.assert_close(maps, Guide(model).attribute(batch.images, batch.target))


def test_figures_are_those_of_all_pictures_together(tmp_path: Path) -> None:
    data = Data(str(runs.birds(tmp_path)), size=12)
    split, groups = open_split(data, "train"), torch.tensor([0] * 3 + [1] * 5 + [2] * 2 + [3] * 9)
    pictures = SplitLoader(split, data, training=False, batch=7, ranks=Ranks(), device=torch.device("cpu"))
    torch.manual_seed(0)
    model = SmallNet((4, 6), (2, 2), num_classes=2).eval()
    batch = pictures.transform(split.dataset.__getitems__(range(48)))
    with torch.no_grad():
        model.fc.bias -= model(batch.images).mean(0)  # or it would say the same of all
        correct = model(batch.images).argmax(1) == batch.target
    assert batch.groups is not None
    found = Evaluator(pictures, groups, GuideOptions(), threshold=0.3)(model)
    expected = group_accuracy(correct, batch.groups, groups)
    assert len({expected.average, expected.worst_group, expected.unbiased, expected.adjusted}) == 4
    for key in ("worst_group", "unbiased", "adjusted"):
        assert 100 * found[f"{key}_accuracy"] == pytest.approx(getattr(expected, key)), key
    assert 100 * found["accuracy"] == pytest.approx(expected.average)
    assert found["smallest_group_pictures"] == batch.groups.unique(return_counts=True)[1].min()
    assert [100 * found[f"group_{g}_accuracy"] for g in range(4)] == pytest.approx(expected.groups, nan_ok=True)
    maps = Guide(model).attribute(batch.images, batch.target)
    share, defined = (part.double() for part in energy_pointing_game(maps, batch.boxes, (12, 12)))
    assert found["epg"] == pytest.approx(float(share.mean())) and found["defined"] == pytest.approx(defined.mean())
    assert found["epg_defined"] == pytest.approx(float(share.sum() / defined.sum()))
    assert found["iou"] == pytest.approx(float(iou_with_boxes(maps, batch.boxes, 0.3, (12, 12)).mean()))
    assert found["iou_threshold"] == 0.3
    bins = box_size_bins(batch.boxes, (12, 12), SIZES)
    for k, name in enumerate(("small", "middle", "large")):
        wanted = float(share[bins == k].mean())
        assert found[f"epg_{name}"] == pytest.approx(wanted, nan_ok=True)


def test_where_the_model_of_each_stage_is_looked_at() -> None:
    named = Recipe(Data("x"), Network("plain/4", layer="body"), Terms(), teacher=Teacher("plain/6", layer="stage"))
    stages = ("student", "pretraining", "identification", "teacher", "teacher-erm", "teacher-identification")

    def layers(recipe: Recipe) -> list[str]:
        return [attribution_options(recipe, stage).layer for stage in stages]

    assert layers(named) == ["body"] * 3 + ["stage"] * 3
    named.transplant = Transplant()  # whose student has its projector behind that layer
    assert layers(named) == ["Final", "body", "body"] + ["stage"] * 3
    named.terms.guide = GuideOptions(layer="Input", attribution="grad_cam")
    assert layers(named) == ["Input", "Input", "body"] + ["stage"] * 3
    assert (
        attribution_options(named, "student").attribution == "grad_cam"
        and attribution_options(named, "teacher").attribution is None
    )
    assert layers(Recipe(Data("x"), Network("a"), Terms())) == ["Final"] * 6


def labelled(folder: Path, shows: dict[str, list[tuple[int, ...]]]) -> Path:
    """Prepared images of three classes; of each split, the classes that each image shows, with a box of each."""
    for split, pictures in shows.items():
        boxes = [
            {"image_id": 10 + i, "bbox": [4 * k, 3, 12, 16], "category_id": (3, 7, 90)[k]}
            for i, classes in enumerate(pictures)
            for k in classes
        ]
        trees.coco(folder / "src", len(pictures), split=split, boxes=boxes)
    prepare("coco", folder / "src", folder / "data", size=12, workers=1)
    return folder / "data"


@pytest.mark.filterwarnings("error")
def test_classes_that_a_split_lacks_are_left_out_of_the_mean(tmp_path: Path) -> None:
    shows = {"train": [(0,), (1,), (2,), (0, 1)], "val": [(0,), (), (0, 2), (2,), ()], "test": [(), (), ()]}
    data = Data(str(labelled(tmp_path, shows)), size=12)
    torch.manual_seed(0)
    model = SmallNet((4, 6), (2, 2), num_classes=3).eval()

    def measured(key: str) -> tuple[Split, dict[str, float]]:
        split = open_split(data, key)
        pictures = SplitLoader(split, data, training=False, batch=2, ranks=Ranks(), device=torch.device("cpu"))
        return split, Evaluator(pictures, None, GuideOptions())(model)

    validation, found = measured("validation")
    batch = validation.dataset.__getitems__(range(5))
    pictures = SplitLoader(validation, data, training=False, batch=5, ranks=Ranks(), device=torch.device("cpu"))
    with torch.no_grad():
        logits = model(pictures.transform(batch).images)
    each = [average_precision_score(batch.target[:, k], logits[:, k]) for k in (0, 2)]
    assert found["map"] == pytest.approx(sum(each) / 2) and found["map_classes"] == 2
    assert available_metrics(validation) == ("f1", "epg", "iou")
    test, found = measured("test")
    assert found["map"] != found["map"] and found["map_classes"] == 0
    assert not {"epg", "iou", "accuracy"} & found.keys()
    assert available_metrics(test) == ()


def test_selection_by_what_validation_cannot_tell_is_refused_by_name(tmp_path: Path) -> None:
    shows = {"train": [(0,), (1,), (2,), (0, 1)], "val": [(), ()]}
    document = {**runs.PLAIN, "schedule": {"epochs": 1, "batch": 2}, "data": {"size": 12}}
    recipe = runs.write(tmp_path / "recipe.yaml", labelled(tmp_path, shows), document)
    for rule in ("f1", "pareto", "worst_group", "accuracy"):
        with pytest.raises(RecipeError, match=rf"selection.rule: {rule} needs \w+, and the validation .* give none"):
            runs.train(recipe, tmp_path / rule, "--selection.rule", rule)
        assert not (tmp_path / rule / "student").exists()
    with pytest.raises(RecipeError, match=r"selection.rule: f1 needs f1"):
        runs.train(recipe, tmp_path / "default")
    stage = runs.train(recipe, tmp_path / "last", "--selection.rule", "last")
    assert stage.facts["figures"]["map"] is None and stage.facts["training_groups"] is None


def test_evaluation_of_a_finished_run_reads_each_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = runs.write(
        tmp_path / "plain.yaml", runs.birds(tmp_path), {**runs.PLAIN, "student": {"name": "small/4,4/1"}}
    )
    runs.train(recipe, tmp_path / "run", "--schedule.epochs", "1")
    read: list[tuple[str, int]] = []
    inner = PackedDataset.__getitems__

    def counted(self: PackedDataset, indices: Any) -> Batch:
        read.extend((self.split, int(i)) for i in indices)
        return inner(self, indices)

    monkeypatch.setattr(PackedDataset, "__getitems__", counted)
    document, _ = evaluate_run(tmp_path / "run", "student", None, None)
    # Training computed no maps, so that the validation images choose the threshold of the IoU.
    assert sorted(read) == [("test", i) for i in range(16)] + [("val", i) for i in range(16)]
    assert document["figures"]["epg"] is not None and document["figures"]["worst_group_accuracy"] is not None
