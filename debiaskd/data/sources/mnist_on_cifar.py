"""MNIST's digits on CIFAR-10's photographs: a shortcut whose strength is chosen, with exact boxes and four groups.

The class is whether the digit is below five; the photograph shows land (a truck or a horse) or water (a ship). In
training the photograph almost always agrees with the class, 0 to 4 on land and 5 to 9 on water, so that a model can do
well without looking at the digit; in validation and test it agrees half of the time and tells nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from debiaskd.data.sources import cifar, mnist, pasting, shortcut
from debiaskd.data.sources.cifar_files import Images
from debiaskd.data.sources.problems import DataError, Problems
from debiaskd.data.sources.records import Source, Split, choose_splits
from debiaskd.utils import checks

DIGITS = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
CLASSES, PLACES = ("0 to 4", "5 to 9"), ("land", "water")
#: Group 2 * class + place. Groups 0 and 3 follow the shortcut, 1 and 2 contradict it.
GROUPS = tuple(f"{digits} on {place}" for digits in CLASSES for place in PLACES)
LAND, WATER = ("horse", "truck"), ("ship",)
SPLITS = ("train", "val", "test")
#: Which share of the digits each split gets where there is but one set of them, and the share of a training set, of
#: digits or photographs, that becomes training and validation where the test set is another.
SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}
SHARES_OF_TRAINING = {"train": 0.8, "val": 0.2}
SMALLEST = 32  # side of the images; in smaller ones strokes get lost


def read(
    path: Path,
    problems: Problems,
    *,
    splits: Sequence[str] | None = None,
    size: int = 64,
    seed: int = 0,
    agreement: float = 0.95,
    train: int = 6000,
    val: int = 1000,
    test: int = 2000,
) -> Source:
    """Draw the data set. The same files and arguments give the same bytes.

    Photographs of CIFAR-10's training set are dealt between training and validation, those of its test set are for the
    test. So are MNIST's digits, if both of its sets are there; one alone is dealt between all three. Within a split
    digits and photographs are drawn with replacement; none is in two of them. Every image has one box, the tightest
    around the digit's ink.

    Args:
        path: the folder that holds `mnist/` (IDX files) and `cifar10/` (whatever the source "cifar" reads).
        problems: collects what is passed over.
        splits: among "train", "val" and "test"; None: all. The others' images do not depend on it.
        size: side of the images in pixels, >= 32, at which they are drawn.
        seed: in 0..2^32 - 1; decides which digits and photographs go into which split, and everything about each
            image.
        agreement: share, in [0, 1], of the training images whose photograph agrees with the class, met up to
            rounding within either class. In validation and test it is one half: four groups of the same size.
        train, val, test: number of images, >= 4. Half of each split has either class.

    Raises:
        DataError: MNIST or CIFAR-10 is not there or damaged, or too small; arguments out of range.
        TypeError: arguments of another type.
    """
    counts = {"train": train, "val": val, "test": test}
    _check(path, seed, agreement, {"size": (size, SMALLEST), **{name: (n, 4) for name, n in counts.items()}})
    chosen = choose_splits(SPLITS, splits, path, lambda: list(SPLITS))
    generator = torch.Generator().manual_seed(4 * seed)
    digits, digit_pools = _digits(path / "mnist", generator, problems)
    photographs, photograph_pools = _photographs(path / "cifar10", generator, problems)
    made = {}
    for name in chosen:
        own = torch.Generator().manual_seed(4 * seed + 1 + SPLITS.index(name))  # whatever else is asked for
        share = agreement if name == "train" else 0.5
        labels, places, members = shortcut.draw(counts[name], share, digit_pools[name], own)
        backgrounds = torch.empty_like(labels)
        for place, pool in enumerate(photograph_pools[name]):
            rows = (places == place).nonzero()[:, 0]
            backgrounds[rows] = pool[torch.randint(len(pool), (len(rows),), generator=own)]
        drawing = _drawing(digits, members, photographs[name], backgrounds, size, own)
        made[name] = _split(path, drawing, labels.tolist(), places.tolist())
    options = {"seed": seed, "agreement": agreement, **counts}
    return Source("mnist_on_cifar", path, CLASSES, False, GROUPS, made, options)


def _check(path: Path, seed: int, agreement: float, sizes: Mapping[str, tuple[int, int]]) -> None:
    for name, (value, least) in {"seed": (seed, 0), **sizes}.items():
        if checks.integer(name, value) < least:
            raise DataError(f"{name} must be >= {least}, got {value}")
    if seed >= 1 << 32:
        raise DataError(f"seed must be < 2^32, got {seed}")
    if not 0 <= checks.number("agreement", agreement) <= 1:
        raise DataError(f"agreement must be a share in [0, 1], got {agreement!r}")
    for name in ("mnist", "cifar10"):
        if not (path / name).is_dir():
            raise DataError(f"{path / name}: no such folder; SRC must hold mnist/ and cifar10/")


@dataclass(frozen=True)
class _Digits:
    """Those of all sets, uint8 [M,28,28], and where each comes from."""

    images: NDArray[np.uint8]
    names: list[str]


@dataclass(frozen=True)
class _Photographs:
    """Those of one of CIFAR-10's splits, and where each comes from."""

    images: Images
    names: list[str]


def _digits(folder: Path, generator: torch.Generator, problems: Problems) -> tuple[_Digits, dict[str, list[Tensor]]]:
    """All digits, and for each split the numbers of those it may use, by class."""
    sets = mnist.read(folder)
    names = [f"{name}:{row}" for name, (images, _) in sets.items() for row in range(len(images))]
    images = np.concatenate([images for images, _ in sets.values()])
    labels = torch.from_numpy(np.concatenate([labels for _, labels in sets.values()]))
    classes = torch.isin(labels, torch.tensor(DIGITS[1])).long()
    visible = torch.from_numpy(images.max((1, 2)) >= 128)
    tally = problems.tally(folder.name, "digits", of_file=True)
    tally.total = len(names)
    for number in (~visible).nonzero()[:, 0].tolist():
        problems.add("digit without ink, left out", names[number], tally)
    in_test = torch.arange(len(images)) >= len(sets["train"][0]) if len(sets) == 2 else torch.zeros_like(visible)
    train, test = (_kinds(classes, visible & part, generator) for part in (~in_test, in_test))
    return _Digits(images, names), _deal(train, test if len(sets) == 2 else None, "digits", folder)


def _photographs(
    folder: Path, generator: torch.Generator, problems: Problems
) -> tuple[dict[str, _Photographs], dict[str, list[Tensor]]]:
    """The photographs of each split, and the numbers of those it may use, by place."""
    own = Problems(problems.strict, problems.lenient)  # its splits are not those that are drawn
    source = cifar.read(folder, own, splits=("train", "test"))
    own.check(source.splits)
    problems.merge(own.found)
    missing = [name for name in (*LAND, *WATER) if name not in source.classes]
    if missing:
        raise DataError(f"{folder}: must be CIFAR-10, and has no class {', '.join(missing)}")
    place = torch.tensor([int(name in WATER) for name in source.classes])
    wanted = torch.tensor([name in (*LAND, *WATER) for name in source.classes])
    kinds, photographs = {}, {}
    for name, split in source.splits.items():
        classes = torch.tensor(split.classes)
        kinds[name] = _kinds(place[classes], wanted[classes], generator)
        assert isinstance(split.pictures, Images)
        photographs[name] = _Photographs(split.pictures, split.paths)
    photographs["val"] = photographs["train"]
    return photographs, _deal(kinds["train"], kinds["test"], "photographs", folder)


def _kinds(values: Tensor, usable: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Numbers of the usable members, in random order, of value 0 and of value 1."""
    order = torch.randperm(len(values), generator=generator)
    order = order[usable[order]]
    return [order[values[order] == value] for value in (0, 1)]


def _deal(train: list[Tensor], test: list[Tensor] | None, what: str, folder: Path) -> dict[str, list[Tensor]]:
    pools = shortcut.deal(train, SHARES if test is None else SHARES_OF_TRAINING)
    if test is not None:
        pools["test"] = test
    for name, pool in pools.items():
        if not all(len(members) for members in pool):
            raise DataError(f"{folder}: too few {what}: none of some kind is left for {name}")
    return pools


@dataclass(frozen=True)
class _Drawing:
    """What the images of a split are drawn of; columns as `pasting.Sheet` has them."""

    digits: _Digits
    members: NDArray[np.int64]
    photographs: _Photographs
    backgrounds: NDArray[np.int64]
    sides: NDArray[np.int64]
    places: NDArray[np.int64]
    tints: NDArray[np.int64]
    size: int

    def part(self, start: int, stop: int) -> pasting.Sheet:
        rows = slice(start, stop)
        return pasting.Sheet(
            self.photographs.images.take(self.backgrounds[rows]),
            self.digits.images[self.members[rows]],
            self.sides[rows],
            self.places[rows],
            self.tints[rows],
            self.size,
        )

    def name(self, i: int) -> str:
        return f"{self.digits.names[self.members[i]]} on {self.photographs.names[self.backgrounds[i]]}"

    def box(self, i: int) -> tuple[int, int, int, int]:
        ink = pasting.scaled_ink(self.digits.images[self.members[i]], int(self.sides[i]))
        return pasting.box(ink, self.places[i], self.size)


def _drawing(
    digits: _Digits,
    members: Tensor,
    photographs: _Photographs,
    backgrounds: Tensor,
    size: int,
    generator: torch.Generator,
) -> _Drawing:
    count = len(members)
    low, high = round(pasting.SMALLEST * size), round(pasting.LARGEST * size)
    sides = torch.randint(low, high + 1, (count,), generator=generator).numpy()
    places = torch.randint(pasting.FRACTIONS, (count, 2), generator=generator).numpy()
    tints = torch.randint(pasting.TINTS, (count, 3), generator=generator).numpy()
    return _Drawing(digits, members.numpy(), photographs, backgrounds.numpy(), sides, places, tints, size)


def _split(path: Path, drawing: _Drawing, labels: Sequence[int], places: Sequence[int]) -> Split:
    split = Split(path, drawing)
    for i, (label, place) in enumerate(zip(labels, places)):
        split.add(drawing.name(i), [(drawing.box(i), label, 0)], target=label, group=2 * label + place)
    return split
