"""Recipes whose attributions are guided into masks, and measured by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import data_trees as trees
import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="images are prepared with pillow")
pytest.importorskip("lightning_fabric", reason="needs the train extra")

import training_runs as runs
from PIL import Image

from debiaskd.attribution.guide import Guide
from debiaskd.data import prepare
from debiaskd.evaluation.evaluate import LoadedStage, evaluate_run
from debiaskd.metrics import energy_in_box
from debiaskd.models.input import default_contract
from debiaskd.recipe import Data, RecipeError
from debiaskd.terms import GuideOptions, make_guide
from debiaskd.training.batches import InputTransform, open_split
from debiaskd.training.validation import has_boxes

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("training_masks")]
GUIDED: dict[str, Any] = {**runs.PLAIN, "terms": {"supervised": {}, "guide": {"weight": 5.0}}}


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Waterbirds whose masks are the diagonal halves of images."""
    root = tmp_path_factory.mktemp("masked")
    rows = [(i % 2, 0 if i < 24 else 1 if i < 36 else 2, (i // 2) % 2) for i in range(48)]
    trees.waterbirds(root / "birds", rows)
    (root / "masks" / "birds").mkdir(parents=True)
    y, x = np.mgrid[0:30, 0:40]
    for i in range(40):  # the last images have none
        Image.fromarray(np.uint8(255 * (x * 3 > y * 4))).save(root / "masks" / "birds" / f"{i}.png")
    prepare("waterbirds", root / "birds", root / "out", size=16, masks=root / "masks")
    return root / "out"


def test_masks_move_with_the_image_to_the_networks_input(birds: Path) -> None:
    split = open_split(Data(str(birds), masks=True), "train")
    batch = split.whole.__getitems__([0, 1, 2])
    assert batch.boxes.masks is not None
    assert has_boxes(split)
    contract = default_contract("", (32, 32))
    transform = InputTransform(contract, torch.device("cpu"), flip=True, crop_scale=(0.4, 1.0))
    # Images whose pixels are their masks show where those have to be.
    white = (batch.boxes.mask((16, 16)) * 255).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    torch.manual_seed(3)
    shown = transform(replace(batch, images=white))
    bright = shown.images[:, 0] * contract.std[0] + contract.mean[0] > 0.5
    mask = shown.boxes.mask((32, 32))
    assert (bright != mask).float().mean() < 0.03
    assert (bright != mask.flip(2)).float().mean() > 0.2


def test_a_recipe_guides_into_masks_and_measures_by_them(birds: Path, tmp_path: Path) -> None:
    found = {}
    for name, masks in (("boxes", False), ("masks", True)):
        document = {**GUIDED, "data": {"masks": masks, "flip": False}}
        runs.train(runs.write(tmp_path / f"{name}.yaml", birds, document), tmp_path / name)
        found[name] = evaluate_run(tmp_path / name, "student", None, None)[0]["figures"]["epg"]
    whole = open_split(Data(str(birds), masks=True), "test").whole
    batch = InputTransform(default_contract("", (16, 16)), torch.device("cpu"))(whole.__getitems__(range(len(whole))))
    student = LoadedStage(tmp_path / "masks", "student", None).model
    maps = make_guide(GuideOptions(), student).attribute(batch.images, batch.target)
    assert found["masks"] == pytest.approx(float(energy_in_box(maps, batch.boxes, (16, 16)).mean()), abs=1e-5)
    assert found["masks"] != found["boxes"]


def test_data_without_masks_is_refused_by_name(tmp_path: Path) -> None:
    data = runs.birds(tmp_path)
    with pytest.raises(RecipeError, match=r"data\.masks: .* was prepared without masks"):
        open_split(Data(str(data), masks=True), "train")


def test_guidance_sees_masks_where_rand_augment_has_moved_them(
    birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, sizes = Guide.guide, []

    def noted(self: Guide, seen: Any, target: torch.Tensor, boxes: Any, *rest: Any) -> Any:
        sizes.append(boxes.mask((16, 16)).sum((1, 2)))
        return inner(self, seen, target, boxes, *rest)

    monkeypatch.setattr(Guide, "guide", noted)
    document = {**GUIDED, "data": {"masks": True, "flip": False, "rand_augment": [2, 25]}}
    runs.train(runs.write(tmp_path / "r.yaml", birds, document), tmp_path / "run")
    # All masks are one diagonal half of the image until they are moved.
    assert torch.cat(sizes).unique().numel() > 10
