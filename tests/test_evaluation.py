"""What evaluation judges: each label of a picture by its own boxes, and nothing by areas that are to be ignored."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("torchdata")

from debiaskd import Boxes
from debiaskd.data import Batch
from debiaskd.guide import Guide
from debiaskd.models import SmallNet
from debiaskd.training.evaluation import attributions


def several(ignore: Boxes | None) -> Batch:
    """Three pictures: of classes 0 and 2, of class 1, and of none."""
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
