"""The images: their groups, boxes and splits are what the data set says they are."""

import pytest
import torch
from sklearn.datasets import load_digits

from debiaskd.data.sources import digits


@pytest.fixture(scope="module")
def data():
    return digits.load(3, train=400, validation=80, test=120, backgrounds=True)


def splits(data):
    return {"train": data.train, "validation": data.validation, "test": data.test}


def test_shapes_and_types(data):
    for pictures, count in ((data.train, 400), (data.validation, 80), (data.test, 120)):
        assert len(pictures) == count == len(pictures.boxes)
        assert pictures.images.shape == (count, 3, 48, 48) and pictures.images.dtype == torch.uint8
        for ids in (pictures.labels, pictures.photographs, pictures.groups, pictures.digits):
            assert ids.shape == (count,) and ids.dtype == torch.int64


def test_no_digit_image_is_in_two_splits():
    data = digits.load(1, train=4000, validation=2000, test=2000)
    used = [set(pictures.digits.tolist()) for pictures in splits(data).values()]
    assert all(len(part) > 100 for part in used)
    assert used[0].isdisjoint(used[1]) and used[0].isdisjoint(used[2]) and used[1].isdisjoint(used[2])


def test_labels_are_those_of_the_digits(data):
    targets = torch.from_numpy(load_digits().target)
    for pictures in splits(data).values():
        drawn = targets[pictures.digits]
        assert set(drawn[pictures.labels == 1].tolist()) == {0, 6, 8, 9}
        assert set(drawn[pictures.labels == 0].tolist()) == {1, 4, 7}


def test_proportions_are_exact_in_training_and_even_elsewhere(data):
    assert data.train.groups.bincount().tolist() == [190, 10, 10, 190]
    assert data.validation.groups.bincount().tolist() == [20] * 4
    assert data.test.groups.bincount().tolist() == [30] * 4
    for pictures in splits(data).values():
        assert torch.equal(pictures.groups, 2 * pictures.labels + pictures.photographs)


def test_other_agreement():
    data = digits.load(0, train=100, validation=4, test=4, agreement=0.7)
    assert data.train.groups.bincount().tolist() == [35, 15, 15, 35]


def test_boxes_are_exact(data):
    for pictures in splits(data).values():
        changed = (pictures.images != pictures.backgrounds).any(1)
        assert not (changed & ~pictures.boxes.mask((48, 48))).any(), "a pixel outside of a box changed"
        for picture, (x0, y0, x1, y1) in zip(changed, pictures.boxes.coords.tolist()):
            inside = picture[y0:y1, x0:x1]
            edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
            assert all(edge.any() for edge in edges), "the box is larger than the digit"


def test_digits_differ_in_place_and_size(data):
    x0, y0, x1, y1 = data.train.boxes.coords.T
    assert len(x0.unique()) > 20 and len(y0.unique()) > 20
    height = y1 - y0
    assert height.min() >= 16 and height.max() <= 36 and len(height.unique()) > 8
    assert min(int(x0.min()), int(y0.min())) >= 0 and max(int(x0.min()), int(y0.min())) <= 4
    assert max(int(x1.max()), int(y1.max())) <= 48 and min(int(x1.max()), int(y1.max())) >= 44


def test_backgrounds_are_crops_of_their_photographs(data):
    """The flower's photograph has less blue than the other by far: a wrong assignment would show."""
    colour = data.test.backgrounds.float().mean((2, 3))
    blue = colour[:, 2]
    which = data.test.photographs
    assert blue[which == 0].mean() > 1.2 * blue[which == 1].mean()
    assert digits.load(0, train=4, validation=4, test=4).train.backgrounds is None


def test_the_seed_decides_everything():
    first, again, other = (digits.load(seed, train=60, validation=12, test=12) for seed in (5, 5, 6))
    for one, two, three in zip(*(splits(data).values() for data in (first, again, other))):
        for name in ("images", "labels", "groups", "digits"):
            assert torch.equal(getattr(one, name), getattr(two, name))
        assert torch.equal(one.boxes.coords, two.boxes.coords)
        assert not torch.equal(one.images, three.images)


def test_drawing_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    digits.load(0, train=8, validation=4, test=4)
    assert torch.equal(before, torch.get_rng_state())


def test_other_sizes():
    data = digits.load(0, train=8, validation=4, test=4, size=32)
    assert data.test.images.shape == (4, 3, 32, 32)
    assert int(data.test.boxes.coords.max()) <= 32


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
        ({"train": 3}, ValueError, "train must be >= 4, got 3"),
        ({"test": 8.0}, TypeError, "test must be an integer, got 8.0"),
        ({"size": 8}, ValueError, "size must be >= 16, got 8"),
        ({"agreement": 1.5}, ValueError, r"agreement must be a share in \[0, 1\], got 1.5"),
        ({"agreement": "much"}, TypeError, "agreement must be a number, got str"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        digits.load(**{"seed": 0, **options})


# -- as a source of `debiaskd prepare` ---------------------------------------------------------------------------------

SMALL = {"train": 40, "val": 8, "test": 12, "size": 24, "seed": 3}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_what_is_prepared_is_what_is_drawn(tmp_path, split):
    from debiaskd.data import PackedDataset, prepare

    prepare("digits", None, tmp_path, splits=[split], shard_size=16, **SMALL)
    drawn = digits.load(3, train=40, validation=8, test=12, size=24)
    wanted = {"train": drawn.train, "val": drawn.validation, "test": drawn.test}[split]
    found = PackedDataset(tmp_path, split)
    assert tuple(found.classes) == digits.LABELS and tuple(found.groups) == digits.GROUPS
    batch = found.__getitems__(list(range(len(found))))
    assert torch.equal(batch.images, wanted.images)
    assert torch.equal(batch.target, wanted.labels) and torch.equal(batch.groups, wanted.groups)
    assert torch.equal(batch.boxes.coords, wanted.boxes.coords) and torch.equal(batch.boxes.labels, wanted.labels)


def test_it_is_prepared_by_the_command(tmp_path, capsys):
    from debiaskd.cli.entry import main

    options = [f"--{name}={value}" for name, value in SMALL.items()]
    assert main(["prepare", "digits", str(tmp_path / "out"), "--workers", "1", *options]) == 0
    assert "train: 40 images, 40 boxes; 2 of 2 classes, 4 of 4 groups" in capsys.readouterr().out
    assert main(["prepare", "digits", str(tmp_path / "out"), "--train", "3"]) == 2
    assert "train must be >= 4, got 3" in capsys.readouterr().err
