"""Handwritten digits on photographs: real images with a known shortcut and exact boxes, without downloads.

The digits of scikit-learn's `load_digits` (8×8 grey levels, UCI ML repository) are pasted at random places and sizes
on crops of its two photographs (`load_sample_images`). The label says whether the digit is drawn with a closed loop,
{0,6,8,9}, or without, {1,4,7}. In training the photograph almost always agrees with the label, so that a model can do
well without looking at the digit; in validation and test it agrees half of the time and tells nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from debiaskd.boxes import Boxes
from debiaskd.data.sources import shortcut
from debiaskd.data.sources.problems import DataError, Problems
from debiaskd.data.sources.records import Source, Split, choose_splits
from debiaskd.utils import checks

LABELS = ("open", "closed loop")
PHOTOGRAPHS = ("china", "flower")
#: Group 2 * label + photograph. Groups 0 and 3 follow the shortcut, 1 and 2 contradict it.
GROUPS = tuple(f"{label} on {photograph}" for label in LABELS for photograph in PHOTOGRAPHS)
OPEN, CLOSED = (1, 4, 7), (0, 6, 8, 9)

#: Which share of the digits' handwriting each split gets; no digit image is in two of them.
SHARES = {"train": 0.6, "validation": 0.15, "test": 0.25}
# The side of a digit's 8×8 grid, as a share of the image's; its blurred edge reaches half a cell further.
SMALLEST, LARGEST = 0.42, 0.67
FAINTEST = 0.15  # ink below this is the blur around a stroke: too weak to see, so it is left out of digit and box
OPACITY = (0.7, 1.0)
# The photographs are enlarged and darkened under white ink: at their own scale and brightness their clutter hides
# strokes that are three pixels wide, and then no model reads the digit, debiased or not.
ENLARGED, DARKENED = 2.0, 0.6


@dataclass(frozen=True)
class Pictures:
    """One split of N images.

    Attributes:
        images: uint8 [N,3,S,S], RGB.
        labels: int64 [N], index into `LABELS`.
        photographs: int64 [N], index into `PHOTOGRAPHS`.
        groups: int64 [N], `2 * label + photograph`, index into `GROUPS`.
        digits: int64 [N], which image of `load_digits` was pasted.
        boxes: one for each image, the tightest around the pixels that the digit reaches.
        backgrounds: uint8 [N,3,S,S], the crops before anything was pasted; None unless asked for.
    """

    images: Tensor
    labels: Tensor
    photographs: Tensor
    groups: Tensor
    digits: Tensor
    boxes: Boxes
    backgrounds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Digits:
    """The three splits."""

    train: Pictures
    validation: Pictures
    test: Pictures


def load(
    seed: int,
    *,
    train: int = 6000,
    validation: int = 1000,
    test: int = 2000,
    size: int = 48,
    agreement: float = 0.95,
    backgrounds: bool = False,
) -> Digits:
    """Draw the data set. The same arguments give the same images.

    Args:
        seed: decides which digits go into which split, and everything about each image.
        train, validation, test: number of images in each split, ≥ 4. Half of each split has either label.
        size: side of the images in pixels, ≥ 16.
        agreement: share, in [0, 1], of the training images whose photograph agrees with the label, met exactly up
            to rounding within either label. In validation and test it is one half.
        backgrounds: keep the crops without digits too.

    Raises:
        ModuleNotFoundError: scikit-learn or pillow is not installed.
        TypeError, ValueError: arguments out of range.

    Example:
        >>> from debiaskd.data.sources import digits
        >>> data = digits.load(0, train=40, validation=8, test=8)
        >>> data.train.images.shape, data.train.groups.bincount().tolist()
        (torch.Size([40, 3, 48, 48]), [19, 1, 1, 19])
    """
    counts = {"train": train, "validation": validation, "test": test}
    for name, value, least in (("seed", seed, 0), ("size", size, 16), *((n, c, 4) for n, c in counts.items())):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    if checks.number("agreement", agreement, minimum=0) > 1:
        raise ValueError(f"agreement must be a share in [0, 1], got {agreement!r}")
    generator = torch.Generator().manual_seed(seed)
    ink, classes, photographs = _sources()
    splits = {}
    order = torch.randperm(len(classes), generator=generator)
    kinds = [order[torch.isin(classes[order], torch.tensor(kind))] for kind in (OPEN, CLOSED)]
    for name, pool in shortcut.deal(kinds, SHARES).items():
        share = agreement if name == "train" else 0.5
        splits[name] = _draw(counts[name], size, share, ink, pool, photographs, generator, backgrounds)
    return Digits(**splits)


def read(
    path: Path,
    problems: Problems,
    *,
    splits: Sequence[str] | None = None,
    size: int = 48,
    seed: int = 0,
    agreement: float = 0.95,
    train: int = 6000,
    val: int = 1000,
    test: int = 2000,
) -> Source:
    """The data set of `load` for `debiaskd prepare digits`, which reads no files.

    Args:
        path: what the manifest names as the source.
        problems: stays empty.
        splits: among "train", "val" and "test"; None: all. The others' images do not depend on it.
        size, seed, agreement, train, val, test: see `load`; `val` is its `validation`.

    Raises:
        DataError: arguments out of range.
        ModuleNotFoundError: scikit-learn or pillow is not installed.
    """
    try:
        drawn = load(seed, train=train, validation=val, test=test, size=size, agreement=agreement)
    except ValueError as error:
        raise DataError(str(error).replace("validation", "val")) from None
    pictures = {"train": drawn.train, "val": drawn.validation, "test": drawn.test}
    chosen = choose_splits(list(pictures), splits, path, lambda: list(pictures))
    options = {"seed": seed, "agreement": agreement, "train": train, "val": val, "test": test}
    made = {name: _split(path, pictures[name]) for name in chosen}
    return Source("digits", path, LABELS, False, GROUPS, made, options)


@dataclass(frozen=True)
class _Drawn:
    """The pixels of a split, uint8 [N,S,S,3]."""

    images: NDArray[np.uint8]

    def part(self, start: int, stop: int) -> NDArray[np.uint8]:
        return self.images[start:stop]


def _split(path: Path, pictures: Pictures) -> Split:
    split = Split(path, _Drawn(pictures.images.permute(0, 2, 3, 1).contiguous().numpy()))
    columns = (pictures.digits, pictures.labels, pictures.groups, pictures.boxes.coords)
    for i, (digit, label, group, box) in enumerate(zip(*(column.tolist() for column in columns))):
        split.add(f"{i}: digit {digit} on {PHOTOGRAPHS[group % 2]}", [(box, label, 0)], target=label, group=group)
    return split


def _sources() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Ink [M,8,8] in [0,1], classes [M] and the photographs, float [3,H,W] in 0..255."""
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    ink = torch.from_numpy(digits.images).float() / 16
    photographs = []
    for pixels in load_sample_images().images:
        photograph = torch.tensor(pixels).permute(2, 0, 1).float()
        enlarged = F.interpolate(photograph[None], scale_factor=ENLARGED, mode="bilinear", align_corners=False)
        photographs.append(enlarged[0] * DARKENED)
    return ink, torch.from_numpy(digits.target).long(), photographs


def _draw(
    count: int,
    size: int,
    agreement: float,
    ink: Tensor,
    pool: Sequence[Tensor],
    photographs: list[Tensor],
    generator: torch.Generator,
    keep_backgrounds: bool,
) -> Pictures:
    labels, which, digits = shortcut.draw(count, agreement, pool, generator)
    crops = _crop(photographs, which, size, generator)
    coverage = _paste(ink[digits], size, generator)
    low, high = OPACITY
    opacity = low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)
    # Boxes are exact: under darkened photographs and without faint ink, every pixel that is touched changes.
    touched = coverage[:, 0] > 0
    images = (crops + (255 - crops) * coverage * opacity).round().to(torch.uint8)
    boxes = Boxes(_bounds(touched), torch.arange(count + 1))
    plain = crops.round().to(torch.uint8) if keep_backgrounds else None
    return Pictures(images, labels, which, 2 * labels + which, digits, boxes, plain)


def _crop(photographs: list[Tensor], which: Tensor, size: int, generator: torch.Generator) -> Tensor:
    crops = torch.empty(len(which), 3, size, size)
    steps = torch.arange(size)
    for index, photograph in enumerate(photographs):
        members = (which == index).nonzero()[:, 0]
        rows = torch.randint(photograph.shape[1] - size + 1, (len(members),), generator=generator)[:, None] + steps
        columns = torch.randint(photograph.shape[2] - size + 1, (len(members),), generator=generator)[:, None] + steps
        crops[members] = photograph[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)
    return crops


def _paste(ink: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Ink [N,8,8], each at a random size and place inside an empty image: [N,1,size,size] in [0,1]."""
    count = len(ink)
    low, high = round(SMALLEST * size), round(LARGEST * size)
    side = torch.randint(low, high + 1, (count,), generator=generator)
    room = (size - side + 1).float()
    x0, y0 = ((torch.rand(count, generator=generator) * room).floor() for _ in range(2))
    centres = torch.arange(size) + 0.5
    across, down = (2 * (centres - start[:, None]) / side[:, None] - 1 for start in (x0, y0))
    grid = torch.stack(
        (across[:, None, :].expand(count, size, size), down[:, :, None].expand(count, size, size)), dim=-1
    )
    coverage = F.grid_sample(ink[:, None], grid, padding_mode="zeros", align_corners=False)
    return torch.where(coverage < FAINTEST, 0.0, coverage)


def _bounds(touched: Tensor) -> Tensor:
    """The tightest box, int32 [N,4], around the true pixels of [N,H,W]; every image has some."""
    edges = []
    for axis in (1, 2):  # over rows: which columns are touched; over columns: which rows
        line = touched.any(axis).to(torch.uint8)
        edges.append((line.argmax(1), line.shape[1] - line.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = edges
    return torch.stack((x0, y0, x1, y1), dim=1).to(torch.int32)
