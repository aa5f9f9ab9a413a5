"""A batch of images with their annotations, and its collate function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from debiaskd.boxes import Boxes
from debiaskd.utils import checks


@dataclass(frozen=True)
class Batch:
    """N images with their annotations.

    Attributes:
        images: [N,3,H,W], uint8 as stored, or augmented. channels_last if they come from prepared data.
        target: int64 [N], or uint8 [N,K] for multi-label data.
        boxes: boxes of N images, in pixels of `images`.
        groups: int64 [N], or None where there are none.
        index: int64 [N], the index of each image in its data set, or None.
        ignore: areas that count neither as inside nor as outside (crowds with `--crowd mask`), or None.
        teacher_images: [N,C,H,W], the same images as the teacher's input; None: it reads `images`.
        partner, share: int64 [N] and float [N] where images were mixed (mixup, CutMix): image `i` is `share[i]` of its
            own, and the rest is of image `partner[i]` of this batch. None: they are not mixed.

    Example:
        >>> batch = collate([(torch.zeros(3, 8, 8, dtype=torch.uint8), 1, [[0, 0, 4, 4]])] * 2)
        >>> len(batch), batch.images.shape, batch.boxes
        (2, torch.Size([2, 3, 8, 8]), Boxes(2 images, 2 boxes, device=cpu))
    """

    images: Tensor
    target: Tensor
    boxes: Boxes
    groups: Tensor | None = None
    index: Tensor | None = None
    ignore: Boxes | None = None
    teacher_images: Tensor | None = None
    partner: Tensor | None = None
    share: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Pin all tensors (called by a DataLoader with `pin_memory=True`). Pinned tensors are kept."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Any) -> Batch:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(part) for name, part in parts.items() if part is not None})


def collate(samples: Batch | Sequence[Any]) -> Batch:
    """Collate samples (image, target, boxes) into a `Batch` (`collate_fn` of a DataLoader); a `Batch` is returned as it
    is.

    An image is a tensor [3,H,W], of the same size in all samples; a target is an integer, or a tensor [K]; boxes are
    `Boxes` of one image, rows (x0, y0, x1, y1) in whole pixels, or None if they are unknown.

    Raises:
        TypeError, ValueError: a sample is something else; the error names it.

    Example:
        >>> image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        >>> batch = collate([(image, 1, [[0, 0, 4, 4]]), (image, 0, None)])
        >>> batch.target.tolist(), batch.boxes.annotated.tolist()
        ([1, 0], [True, False])
    """
    if isinstance(samples, Batch):
        return samples
    if not checks.sequence("samples", samples):
        raise ValueError("samples must hold at least one, got an empty sequence")
    images, targets, boxes = [], [], []
    for i, sample in enumerate(samples):
        if not isinstance(sample, (tuple, list)) or len(sample) != 3:
            what = f"{len(sample)} parts" if isinstance(sample, (tuple, list)) else type(sample).__name__
            raise TypeError(f"samples[{i}] must be (image, target, boxes), got {what}")
        image, target, known = sample
        checks.rank(f"samples[{i}] image", checks.tensor(f"samples[{i}] image", image), "[3,H,W]")
        if image.shape != samples[0][0].shape:
            raise ValueError(
                f"samples[{i}] image must have the shape of the first, {list(samples[0][0].shape)}, "
                f"got {list(image.shape)}"
            )
        images.append(image)
        targets.append(checks.convertible(f"samples[{i}] target", target, "an integer or a tensor [K]"))
        boxes.append(_boxes(f"samples[{i}] boxes", known))
    return Batch(torch.stack(images), torch.stack(targets), Boxes.cat(boxes))


def _boxes(name: str, known: Any) -> Boxes:
    if not isinstance(known, Boxes):
        return Boxes.from_lists([known])
    if len(known) != 1:
        raise ValueError(f"{name} must be of one image, got {len(known)}")
    return known
