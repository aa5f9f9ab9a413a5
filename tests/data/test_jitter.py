"""Noise on boxes and masks: of the seed alone, within its bound, masks as their boxes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from debiaskd.boxes import Boxes
from debiaskd.data.packed.jitter import bounds, jitter_boxes, jitter_masks, moved_sides, noise
from debiaskd.masks import Masks

ROWS = [[20, 4, 40, 44], [0, 0, 64, 48], [5, 5, 6, 6], [30, 20, 30, 25]]


def test_sides_move_within_the_fraction_and_boxes_keep_a_pixel() -> None:
    boxes = Boxes.from_lists([ROWS] * 50)
    moved = jitter_boxes(boxes, 0.2, (48, 64), seed=3)
    again, other = jitter_boxes(boxes, 0.2, (48, 64), seed=3), jitter_boxes(boxes, 0.2, (48, 64), seed=4)
    assert torch.equal(moved.coords, again.coords)
    assert not torch.equal(moved.coords, other.coords)
    shift = (moved.coords - boxes.coords).view(50, 4, 4)
    most = shift[:, 0].abs().amax(0)
    assert (most <= torch.tensor([4, 8, 4, 8])).all()  # 20 % of 20 and of 40
    assert (most >= torch.tensor([3, 6, 3, 6])).all()
    assert (shift[:, 1].abs().amax(0) <= torch.tensor([13, 10, 13, 10])).all()
    assert (moved.coords.view(50, 4, 4)[:, :3, 2:] > moved.coords.view(50, 4, 4)[:, :3, :2]).all()
    assert (shift[:, 3] == 0).all()  # without area
    assert (moved.coords >= 0).all()
    assert (moved.coords <= torch.tensor([64, 48, 64, 48])).all()
    assert torch.equal(jitter_boxes(boxes, 0.0, (48, 64), seed=3).coords, boxes.coords)


@pytest.mark.parametrize("seed", range(8))
def test_a_rectangle_is_moved_as_its_box(seed: int) -> None:
    boxes = Boxes.from_lists([[row] for row in ROWS])
    masks = Masks.from_lists(list(boxes.mask((48, 64))))
    assert torch.equal(bounds(masks)[:3], boxes.coords[:3])
    shares = 0.3 * noise(4, seed)
    moved = jitter_masks(masks, shares)
    expected = Boxes.from_lists([[row.tolist()] for row in moved_sides(boxes.coords, shares, (48, 64))])
    assert torch.equal(moved.dense(), expected.mask((48, 64)))
    assert torch.equal(jitter_masks(masks, 0 * shares).dense(), masks.dense())


def test_prepared_data_is_read_with_noise_that_belongs_to_each_image(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="images are prepared with pillow")
    from test_prepare_masks import coco

    from debiaskd.data import PackedDataset, prepare

    prepare("coco", coco(tmp_path / "coco"), tmp_path / "out", size=40, masks=True, shard_size=2)
    for masks in (False, True):
        plain = PackedDataset(tmp_path / "out", masks=masks).__getitems__([0, 1]).boxes
        noisy = PackedDataset(tmp_path / "out", masks=masks, jitter=0.4, seed=5)
        once, twice = (noisy.__getitems__(order).boxes.mask((40, 40)) for order in ([0, 1], [1, 0, 0]))
        assert torch.equal(once[[1, 0, 0]], twice)
        assert not torch.equal(once[0], plain.mask((40, 40))[0])
        assert once[0].any()
    with pytest.raises(ValueError, match="jitter must be"):
        PackedDataset(tmp_path / "out", jitter=-0.1)
