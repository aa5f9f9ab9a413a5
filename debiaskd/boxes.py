"""Bounding boxes of a batch of images, packed: no padding, no list of tensors, one copy to the device.

`coords[offsets[i]:offsets[i + 1]]` are the boxes of image `i`, as half-open pixel ranges `[y0:y1, x0:x1]`. Their union,
together with the image's masks where it has any, is the mask M of the localization losses. An image may also be *not
annotated*: then nothing is known about it, which differs from knowing that it contains no box.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from debiaskd.masks import Masks, checked, joined, unpack_bits
from debiaskd.utils import checks
from debiaskd.utils.packed_rows import INT32, as_box_rows, as_image_ids, as_labels, image_ids, rows_of_images


class Boxes:
    """Boxes of N images.

    Args:
        coords: int32 [M,4], rows (x0, y0, x1, y1) in pixels, half-open, x0 <= x1 and y0 <= y1. They may extend beyond
            the image; the part outside is ignored.
        offsets: int64 [N+1], non-decreasing from 0 to M.
        labels: int64 [M], a class for each box, or None.
        annotated: bool [N], False where nothing is known about an image; None means that all are annotated.
        masks: of the same N images, with labels if boxes have them, joined to M; every method transforms both.

    Raises:
        TypeError: an argument is not a tensor or has another dtype.
        ValueError: an argument has another shape or device, a box is inverted, or offsets do not fit. Values are
            checked on the CPU only, so that boxes on an accelerator never synchronise with it.

    Example:
        >>> boxes = Boxes.from_lists([[[4, 2, 9, 8]], [], None])
        >>> len(boxes), boxes.annotated.tolist(), boxes.mask((10, 10)).sum((1, 2)).tolist()
        (3, [True, True, False], [30, 0, 0])
    """

    __slots__ = ("annotated", "coords", "labels", "masks", "offsets")

    coords: Tensor
    offsets: Tensor
    labels: Tensor | None
    annotated: Tensor
    masks: Masks | None

    def __init__(
        self,
        coords: Tensor,
        offsets: Tensor,
        labels: Tensor | None = None,
        annotated: Tensor | None = None,
        masks: Masks | None = None,
    ) -> None:
        checks.packed_boxes(coords, offsets, labels, annotated)
        self.coords, self.offsets, self.labels = coords, offsets, labels
        self.masks = None if masks is None else checked(masks, offsets, labels)
        if annotated is None:
            annotated = torch.ones(offsets.numel() - 1, dtype=torch.bool, device=offsets.device)
        self.annotated = annotated

    @classmethod
    def from_lists(cls, boxes: Sequence[Any], labels: Sequence[Any] | None = None) -> Boxes:
        """Make `Boxes` from one [k,4] list, array or tensor per image; None for an image that is not annotated.

        `labels` has k classes per image (None or empty if it has no boxes). Coordinates must be whole numbers.
        """
        checks.sequence("boxes", boxes)
        rows = [as_box_rows(f"boxes[{i}]", b) for i, b in enumerate(boxes)]
        counts = torch.tensor([0] + [len(r) for r in rows], dtype=torch.int64)
        coords = torch.cat(rows) if rows else torch.zeros(0, 4, dtype=torch.int32)
        annotated = torch.tensor([b is not None for b in boxes], dtype=torch.bool)
        packed = None
        if labels is not None:
            if len(checks.sequence("labels", labels)) != len(rows):
                raise ValueError(f"labels must have one entry an image, {len(rows)}, got {len(labels)}")
            per_image = [as_labels(f"labels[{i}]", v, len(r)) for i, (v, r) in enumerate(zip(labels, rows))]
            packed = torch.cat(per_image) if per_image else torch.zeros(0, dtype=torch.int64)
        return cls(coords, counts.cumsum(0), packed, annotated)

    @classmethod
    def cat(cls, boxes: Sequence[Boxes]) -> Boxes:
        """Concatenate the images of several `Boxes`. Either all of them have labels or none has."""
        if not checks.sequence("boxes", boxes):
            raise ValueError("boxes must hold at least one Boxes, got an empty sequence")
        for i, b in enumerate(boxes):
            if not isinstance(b, Boxes):
                raise TypeError(f"boxes[{i}] must be a dk.Boxes, got {type(b).__name__}")
        labels = [b.labels for b in boxes if b.labels is not None]
        if labels and len(labels) != len(boxes):
            raise ValueError(f"boxes must all have labels or none of them, got labels in {len(labels)} of {len(boxes)}")
        counts = torch.cat([b.offsets[:1] * 0, *(b.offsets.diff() for b in boxes)])
        return cls._trusted(
            torch.cat([b.coords for b in boxes]),
            counts.cumsum(0),
            torch.cat(labels) if labels else None,
            torch.cat([b.annotated for b in boxes]),
            joined([b.masks for b in boxes]),
        )

    @classmethod
    def _trusted(
        cls, coords: Tensor, offsets: Tensor, labels: Tensor | None, annotated: Tensor, masks: Masks | None
    ) -> Boxes:
        """Make `Boxes` without checks."""
        made = cls.__new__(cls)
        made.coords, made.offsets, made.labels, made.annotated, made.masks = coords, offsets, labels, annotated, masks
        return made

    def _with_coords(self, coords: Tensor, masks: Masks | None) -> Boxes:
        return self._trusted(coords, self.offsets, self.labels, self.annotated, masks)

    def with_masks(self, masks: Masks | None) -> Boxes:
        """Return the same boxes with these masks instead of their own."""
        return self._with_coords(self.coords, None if masks is None else checked(masks, self.offsets, self.labels))

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Boxes:
        """Return the boxes of one image, or of several, as `Boxes`: `boxes[3]`, `boxes[4:8]`, `boxes[[0, 2]]`."""
        chosen = as_image_ids(index, len(self), self.offsets.device)
        offsets, rows = rows_of_images(self.offsets, chosen)
        labels = None if self.labels is None else self.labels[rows]
        masks = None if self.masks is None else self.masks[chosen]
        return self._trusted(self.coords[rows], offsets, labels, self.annotated[chosen], masks)

    def __iter__(self) -> Iterator[Boxes]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        labels = "" if self.labels is None else ", labels"
        if self.masks is not None:
            labels += f", {len(self.masks.words)} masks"
        return f"Boxes({len(self)} images, {self.coords.shape[0]} boxes{labels}, device={self.device})"

    @property
    def device(self) -> torch.device:
        return self.coords.device

    def image_ids(self) -> Tensor:
        """int64 [M]: which image each box belongs to."""
        return image_ids(self.offsets, self.coords.shape[0])

    @property
    def objects(self) -> int:
        """The number of boxes and masks of all images."""
        return self.coords.shape[0] + (0 if self.masks is None else len(self.masks.words))

    def for_class(self, target: Tensor) -> Boxes:
        """Keep only the boxes whose label is their image's `target`, int64 [N]. `annotated` is unchanged."""
        if self.labels is None:
            raise ValueError("for_class needs boxes with labels, got labels=None")
        self._check("target", target, torch.int64)
        masks = None if self.masks is None else self.masks.for_class(target)
        return self._keep(self.labels == target[self.image_ids()], masks)

    def annotated_where(self, where: Tensor) -> Boxes:
        """Mark the images where bool [N] is False as not annotated."""
        self._check("where", where, torch.bool)
        return self._trusted(self.coords, self.offsets, self.labels, self.annotated & where, self.masks)

    def _check(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        if checks.tensor(name, value).dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
        checks.shape(name, value, "[N]", [len(self)])
        checks.same_device(name, value, "boxes", self.coords)

    def _keep(self, keep: Tensor, masks: Masks | None) -> Boxes:
        """Remove boxes that are not kept; on an accelerator make them empty, because counting the others would
        synchronise.
        """
        if self.device.type != "cpu":
            return self._with_coords(self.coords * keep[:, None], masks)
        kept_before = torch.cat([self.offsets.new_zeros(1), keep.cumsum(0)])
        labels = None if self.labels is None else self.labels[keep]
        return self._trusted(self.coords[keep], kept_before[self.offsets], labels, self.annotated, masks)

    def without(self, where: Tensor) -> Boxes:
        """Remove the boxes of the images where bool [N]; what is annotated stays so."""
        return self._keep(~where[self.image_ids()], self.masks)

    # -- geometry: the same as for the pixels ------------------------------------------------------------------------

    def dilate(self, fraction: float, size: tuple[int, int], *, inclusive_clip: bool = False) -> Boxes:
        """Move each side outwards by `fraction` of the box's width or height (rounded down), clipped to `size` (H, W).

        `inclusive_clip=True` clips at size - 1, which leaves the last pixel row and column outside every box: a flaw of
        published code (Rao et al. 2023) that is needed to reproduce its numbers. Masks stay as they are.
        """
        fraction = checks.number("fraction", fraction, minimum=0)
        height, width = checks.size("size", size)
        x0, y0, x1, y1 = self.coords.double().unbind(1)
        by_x, by_y = ((x1 - x0) * fraction).floor(), ((y1 - y0) * fraction).floor()
        grown = torch.stack([x0 - by_x, y0 - by_y, x1 + by_x, y1 + by_y], 1)
        return self._with_coords(_clip(grown, height, width, inclusive_clip), self.masks)

    def resize(self, old: tuple[int, int], new: tuple[int, int], *, inclusive_clip: bool = False) -> Boxes:
        """Resize from images of `old` (H, W) to `new` (H, W), rounded to the nearest pixel edge and clipped to `new`.

        A box that covers some pixels of the image keeps at least one. `inclusive_clip` as in `dilate`.
        """
        old_height, old_width = checks.size("old", old)
        height, width = checks.size("new", new)
        scale = [width / old_width, height / old_height] * 2
        coords = _clip(self.coords, old_height, old_width, False)  # a box that covers no pixel must not gain one
        scaled = coords.double() * torch.tensor(scale, dtype=torch.float64, device=self.device)
        moved = (scaled + 0.5).floor()
        nonempty = coords[:, 2:] > coords[:, :2]
        last = torch.tensor([width - 1, height - 1], device=self.device)
        start = torch.where(nonempty, torch.minimum(moved[:, :2], last), moved[:, :2])
        end = torch.where(nonempty, torch.maximum(moved[:, 2:], start + 1), moved[:, 2:])
        masks = None if self.masks is None else self.masks.resize((height, width))
        return self._with_coords(_clip(torch.cat([start, end], 1), height, width, inclusive_clip), masks)

    def hflip(self, width: int) -> Boxes:
        """Mirror left to right in images `width` pixels wide."""
        if checks.integer("width", width) < 1:
            raise ValueError(f"width must be an integer >= 1, got {width!r}")
        x0, y0, x1, y1 = self.coords.long().unbind(1)
        flipped = torch.stack([width - x1, y0, width - x0, y1], 1)
        masks = None if self.masks is None else self.masks.hflip()
        return self._with_coords(flipped.clamp(INT32.min, INT32.max).to(torch.int32), masks)

    def crop(self, y: int, x: int, h: int, w: int) -> Boxes:
        """Crop to `image[y:y + h, x:x + w]`: boxes that extend beyond it are clipped, boxes outside are removed."""
        checks.size("(h, w)", (h, w))
        y, x = checks.integer("y", y), checks.integer("x", x)
        shift = torch.tensor([x, y, x, y], device=self.device)
        masks = None if self.masks is None else self.masks.crop(y, x, h, w)
        cropped = self._with_coords(_clip(self.coords - shift, h, w, False), masks)
        return cropped._keep((cropped.coords[:, 2:] > cropped.coords[:, :2]).all(1), masks)

    def mask(self, size: tuple[int, int]) -> Tensor:
        """Return bool [N,H,W], the union of each image's boxes and masks in an image of `size` (H, W)."""
        height, width = checks.size("size", size)
        x0, y0, x1, y1 = _clip(self.coords, height, width, False).long().unbind(1)
        image = self.image_ids()
        # Corners of a two-dimensional difference array: its running sum counts the boxes over each pixel. Integer
        # sums are exact in any order, so that this is deterministic on every device.
        corners = torch.zeros(len(self), height + 1, width + 1, dtype=torch.int32, device=self.device)
        one = torch.ones_like(image, dtype=torch.int32)
        for rows, columns, sign in ((y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1)):
            corners.index_put_((image, rows, columns), one * sign, accumulate=True)
        inside = corners.cumsum(1).cumsum(2)[:, :height, :width] > 0
        words = self.mask_words((height, width))
        return inside if words is None else inside | unpack_bits(words, height)

    def mask_words(self, size: tuple[int, int]) -> Tensor | None:
        """Return int32 [N,ceil(H/32),W], the union of each image's masks (`debiaskd.masks`); None without masks.

        Raises:
            ValueError: the masks are of another size.
        """
        if self.masks is None:
            return None
        if self.masks.size != tuple(size):
            raise ValueError(f"size must be that of the masks, {self.masks.size}, got {tuple(size)}")
        return self.masks.union()

    def _map(self, function: Callable[[Tensor], Tensor]) -> Boxes:
        labels = None if self.labels is None else function(self.labels)
        masks = None if self.masks is None else self.masks.map(function)
        return self._trusted(function(self.coords), function(self.offsets), labels, function(self.annotated), masks)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Boxes:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Boxes:
        return self._map(Tensor.pin_memory)


def collate(batch: Sequence[Any]) -> Any:
    """Collate samples that contain `Boxes` anywhere (`collate_fn` of a DataLoader); all else as PyTorch does.

    Example:
        >>> sample = (torch.zeros(3, 8, 8), 1, Boxes.from_lists([[[0, 0, 4, 4]]]))
        >>> images, targets, boxes = collate([sample, sample])
        >>> images.shape[0], targets.tolist(), len(boxes)
        (2, [1, 1], 2)
    """
    from torch.utils.data._utils.collate import collate as torch_collate
    from torch.utils.data._utils.collate import default_collate_fn_map

    def boxes_only(parts: Sequence[Boxes], *, collate_fn_map: Any = None) -> Boxes:
        return Boxes.cat(parts)

    return torch_collate(batch, collate_fn_map={**default_collate_fn_map, Boxes: boxes_only})


def _clip(coords: Tensor, height: int, width: int, inclusive: bool) -> Tensor:
    x_limit, y_limit = (width - 1, height - 1) if inclusive else (width, height)
    x = coords[:, 0::2].clamp(0, x_limit)
    y = coords[:, 1::2].clamp(0, y_limit)
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1).to(torch.int32)
