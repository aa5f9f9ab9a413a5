"""Masks of a batch of images, one bit a pixel.

32 rows of a column share a word: bit `r` of `words[m, b, x]` is the pixel in row `32 b + r`, column `x` of mask `m`.
The kernels of `debiaskd.ops.localization` keep the union of an image's boxes in the same layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from debiaskd.utils import checks
from debiaskd.utils.packed_rows import image_ids, rows_of_images

#: Rows that share a word.
ROWS = 32


def pack_bits(dense: Tensor) -> Tensor:
    """Return int32 [..., ceil(H/32), W] of bool [..., H, W]; bits below the last row are 0.

    Example:
        >>> pack_bits(torch.tensor([[True, False], [True, True]])).tolist()
        [[3, 2]]
    """
    *outer, height, width = dense.shape
    bands = -(-height // ROWS)
    padded = torch.nn.functional.pad(dense.to(torch.int32), (0, 0, 0, bands * ROWS - height))
    places = torch.arange(ROWS, dtype=torch.int32, device=dense.device)[:, None]
    return (padded.reshape(*outer, bands, ROWS, width) << places).sum(-2, dtype=torch.int32)


def unpack_bits(words: Tensor, height: int) -> Tensor:
    """Return bool [..., H, W] of int32 [..., ceil(H/32), W]."""
    places = torch.arange(ROWS, dtype=torch.int32, device=words.device)[:, None]
    *outer, bands, width = words.shape
    dense = (words[..., None, :] >> places) & 1
    return dense.reshape(*outer, bands * ROWS, width)[..., :height, :].bool()


class Masks:
    """Masks of N images of one size: any number of an image, at most one of a class.

    Args:
        words: int32 [M, ceil(H/32), W]; see above.
        height: H.
        offsets: int64 [N+1], non-decreasing from 0 to M: image `i` has the masks `offsets[i]:offsets[i + 1]`.
        labels: int64 [M], the class of each mask; None: an image has one mask at most, whatever it shows.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device. Values are not checked.

    Example:
        >>> masks = Masks.from_lists([torch.eye(3) > 0, None], size=(3, 3))
        >>> masks.size, masks.words.tolist(), masks.union().tolist()
        ((3, 3), [[[1, 2, 4]]], [[[1, 2, 4]], [[0, 0, 0]]])
    """

    __slots__ = ("height", "labels", "offsets", "single", "words")

    def __init__(self, words: Tensor, height: int, offsets: Tensor, labels: Tensor | None = None) -> None:
        for name, value, dtype in (
            ("words", words, torch.int32),
            ("offsets", offsets, torch.int64),
            ("labels", labels, torch.int64),
        ):
            if value is None and name == "labels":
                continue
            if checks.tensor(name, value).dtype != dtype:
                raise TypeError(f"{name} must be {dtype}, got {value.dtype}")  # type: ignore[union-attr]
            checks.same_device(name, value, "words", words)  # type: ignore[arg-type]
        checks.rank("words", words, "[M,ceil(H/32),W]")
        bands = -(-checks.integer("height", height) // ROWS)
        if words.shape[1] != bands:
            raise ValueError(f"words must have ceil(height/32)={bands} rows of words, got {list(words.shape)}")
        checks.rank("offsets", offsets, "[N+1]")
        if labels is not None:
            checks.shape("labels", labels, "[M]", [len(words)])
        self.words, self.height, self.offsets, self.labels = words, height, offsets, labels
        #: Whether no two masks of an image hold pixels, so that their union is their sum.
        self.single = labels is None

    @classmethod
    def from_lists(
        cls, masks: Sequence[Any], labels: Sequence[Any] | None = None, *, size: tuple[int, int] | None = None
    ) -> Masks:
        """Make `Masks` from what is known of each image.

        Args:
            masks: of each image bool [H,W] or [k,H,W], or None: no mask.
            labels: k classes of each image, None where there is no mask; masks of one class are joined. None: all masks
                of an image are joined.
            size: (H, W); None: that of the first mask.

        Raises:
            TypeError, ValueError: a mask is not bool, has another size, or has no label.
        """
        dense = [_dense(f"masks[{i}]", m) for i, m in enumerate(checks.sequence("masks", masks))]
        shapes = [tuple(m.shape[1:]) for m in dense if m is not None]
        if size is None and not shapes:
            raise ValueError("size must be given where no image has a mask, got None")
        height, width = checks.size("size", size) if size is not None else shapes[0]
        words, counts, found = [], [0], list[int]()
        for i, one in enumerate(dense):
            if one is None:
                counts.append(0)
                continue
            if tuple(one.shape[1:]) != (height, width):
                raise ValueError(f"masks[{i}] must be of {height}×{width} pixels, got {one.shape[1]}×{one.shape[2]}")
            if labels is None:
                words.append(one.any(0)[None])
            else:
                mine = checks.convertible(f"labels[{i}]", labels[i], "one class a mask").reshape(-1)
                if len(mine) != len(one):
                    raise ValueError(f"labels[{i}] must have one class a mask, {len(one)}, got {len(mine)}")
                kinds = mine.unique().tolist()
                words.append(torch.stack([one[mine == k].any(0) for k in kinds]) if kinds else one)
                found += kinds
            counts.append(len(words[-1]))
        whole = torch.cat(words) if words else torch.zeros(0, height, width, dtype=torch.bool)
        classes = None if labels is None else torch.tensor(found, dtype=torch.int64)
        return cls(pack_bits(whole), height, torch.tensor(counts).cumsum(0), classes)

    @classmethod
    def cat(cls, masks: Sequence[Masks]) -> Masks:
        """Concatenate the images of several `Masks` of one size; either all of them have labels or none has."""
        first = masks[0]
        if any(m.size != first.size for m in masks):
            raise ValueError(f"masks must all be of one size, got {', '.join(str(m.size) for m in masks)}")
        labels = [m.labels for m in masks if m.labels is not None]
        if labels and len(labels) != len(masks):
            raise ValueError(f"masks must all have labels or none of them, got labels in {len(labels)} of {len(masks)}")
        counts = torch.cat([first.offsets[:1] * 0, *(m.offsets.diff() for m in masks)])
        joined = first._with(torch.cat([m.words for m in masks]))
        joined.offsets, joined.labels = counts.cumsum(0), torch.cat(labels) if labels else None
        joined.single = all(m.single for m in masks)
        return joined

    def _with(self, words: Tensor, height: int | None = None) -> Masks:
        """The same masks with other pixels."""
        made = Masks.__new__(Masks)
        made.words, made.height = words, self.height if height is None else height
        made.offsets, made.labels, made.single = self.offsets, self.labels, self.single
        return made

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def __repr__(self) -> str:
        labels = "" if self.labels is None else ", labels"
        count = self.words.shape[0]
        return f"Masks({len(self)} images, {count} masks of {self.height}×{self.size[1]}{labels})"

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.words.shape[2]

    def __getitem__(self, chosen: Tensor) -> Masks:
        """Return the masks of these images, int64 [n]."""
        offsets, rows = rows_of_images(self.offsets, chosen)
        made = self._with(self.words[rows])
        made.offsets, made.labels = offsets, None if self.labels is None else self.labels[rows]
        return made

    def image_ids(self) -> Tensor:
        """int64 [M]: which image each mask belongs to."""
        return image_ids(self.offsets, len(self.words))

    def dense(self) -> Tensor:
        """bool [M,H,W]."""
        return unpack_bits(self.words, self.height)

    def keep(self, where: Tensor) -> Masks:
        """Empty the masks where bool [M] is False: counting the others would synchronise with a device."""
        return self._with(self.words * where[:, None, None])

    def for_class(self, target: Tensor) -> Masks:
        """Keep the masks of each image's class, int64 [N]; masks without labels stay."""
        if self.labels is None:
            return self
        kept = self.keep(self.labels == target[self.image_ids()])
        kept.single = True
        return kept

    def covering(self) -> Tensor:
        """bool [N]: whether an image has a mask with a pixel."""
        some = (self.words != 0).any(2).any(1).to(torch.int64)
        return some.new_zeros(len(self)).index_add_(0, self.image_ids(), some) > 0

    def union(self) -> Tensor:
        """int32 [N, ceil(H/32), W], the union of each image's masks."""
        ids = self.image_ids()
        if self.single:
            return self.words.new_zeros(len(self), *self.words.shape[1:]).index_add_(0, ids, self.words)
        counts = torch.zeros(len(self), *self.size, dtype=torch.int32, device=self.words.device)
        return pack_bits(counts.index_add_(0, ids, self.dense().to(torch.int32)) > 0)

    def either(self, other: Masks | None) -> Masks:
        """One mask an image, without labels: all that this one or `other`, of as many images, covers."""
        words = self.union() if other is None else self.union() | other.union()
        return Masks(words, self.height, torch.arange(len(self) + 1, device=words.device))

    # -- geometry ----------------------------------------------------------------------------------------------------

    def sample(self, rows: Tensor, columns: Tensor) -> Masks:
        """Take the pixels in these rows, int64 [M,h], and columns, int64 [M,w]; one outside of the mask is empty."""
        outside_rows, outside_columns = (rows < 0) | (rows >= self.height), (columns < 0) | (columns >= self.size[1])
        rows, columns = rows.clamp(0, self.height - 1), columns.clamp(0, self.size[1] - 1)
        each = torch.arange(len(self.words), device=self.words.device)[:, None, None]
        narrowed = self.words.gather(2, columns[:, None, :].expand(-1, self.words.shape[1], -1))
        bits = narrowed[each, (rows // ROWS)[:, :, None], torch.arange(columns.shape[1], device=rows.device)]
        dense = ((bits >> (rows % ROWS).to(torch.int32)[:, :, None]) & 1).bool()
        dense &= ~(outside_rows[:, :, None] | outside_columns[:, None, :])
        return self._with(pack_bits(dense), rows.shape[1])

    def crop_resize(self, windows: Tensor, size: tuple[int, int]) -> Masks:
        """Crop a window, int64 [N,4] rows (x0, y0, x1, y1), of every image and resize it to `size`.

        A pixel of the result takes the one in which its centre lies, so that a rectangle moves as a box does: a centre
        on the edge between two pixels belongs to the first.
        """
        mine = windows[self.image_ids()].long()
        columns, rows = (_centres(mine[:, a], mine[:, a + 2] - mine[:, a], size[1 - a]) for a in (0, 1))
        return self.sample(rows, columns)

    def resize(self, size: tuple[int, int]) -> Masks:
        if size == self.size:
            return self
        whole = torch.tensor([0, 0, self.size[1], self.height], device=self.words.device)
        return self.crop_resize(whole.expand(len(self), 4), size)

    def crop(self, y: int, x: int, h: int, w: int) -> Masks:
        """Crop to `[y:y + h, x:x + w]`, which may reach beyond the mask."""
        count, device = len(self.words), self.words.device
        rows, columns = (torch.arange(a, a + n, device=device).expand(count, n) for a, n in ((y, h), (x, w)))
        return self.sample(rows, columns)

    def hflip(self, where: Tensor | None = None) -> Masks:
        """Mirror left to right, all images or where bool [N]."""
        mirrored = self.words.flip(2)
        if where is not None:
            mirrored = torch.where(where[self.image_ids()][:, None, None], mirrored, self.words)
        return self._with(mirrored)

    def map(self, function: Callable[[Tensor], Tensor]) -> Masks:
        """The same masks with every tensor changed: moved, or pinned."""
        made = self._with(function(self.words))
        made.offsets, made.labels = function(self.offsets), None if self.labels is None else function(self.labels)
        return made


def checked(masks: Masks, offsets: Tensor, labels: Tensor | None) -> Masks:
    """The masks that belong to boxes with these offsets and labels."""
    if not isinstance(masks, Masks):
        raise TypeError(f"masks must be debiaskd.masks.Masks, got {type(masks).__name__}")
    if len(masks) != offsets.numel() - 1:
        raise ValueError(f"masks must be of N={offsets.numel() - 1} images, as boxes are, got {len(masks)}")
    checks.same_device("masks", masks.words, "offsets", offsets)
    if (masks.labels is None) != (labels is None):
        raise ValueError("masks and boxes must both have labels or neither")
    return masks


def joined(masks: Sequence[Masks | None]) -> Masks | None:
    """Those of all images; images without any of their own have none."""
    there = [m for m in masks if m is not None]
    if not there:
        return None
    if len(there) < len(masks):
        raise ValueError(f"boxes must all have masks or none of them, got masks in {len(there)} of {len(masks)}")
    return Masks.cat(there)


def _centres(start: Tensor, extent: Tensor, steps: int) -> Tensor:
    """int64 [M,steps]: the pixel in which each pixel of the result has its centre, exactly."""
    place = torch.arange(steps, device=start.device) * 2 + 1
    return start[:, None] + torch.div(extent[:, None] * place - 1, 2 * steps, rounding_mode="floor")


def _dense(name: str, mask: Any) -> Tensor | None:
    if mask is None:
        return None
    dense = checks.convertible(name, mask, "bool [H,W] or [k,H,W]")
    if dense.dtype != torch.bool:
        raise TypeError(f"{name} must be torch.bool, got {dense.dtype}")
    if dense.dim() not in (2, 3):
        raise ValueError(f"{name} must have shape [H,W] or [k,H,W], got {list(dense.shape)}")
    return dense[None] if dense.dim() == 2 else dense
