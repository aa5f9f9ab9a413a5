"""Items of a user's data set, checked one by one and made into samples of prepared data."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from debiaskd.data import pixels
from debiaskd.data.packed.fit_masks import FittedMasks, fit_classes
from debiaskd.data.packed.item_masks import masks_by_class
from debiaskd.data.packed.item_values import Wrong, array_of
from debiaskd.data.packed.shards import Sample
from debiaskd.data.sources.masks import EMPTY
from debiaskd.data.sources.problems import DataError
from debiaskd.data.sources.records import box_fault


@dataclass(frozen=True)
class Fault:
    """An item that is no sample: `kind` is why it is skipped; None: the data set is not what it has to be."""

    kind: str | None
    text: str


class Items:
    """The samples of a data set, by number.

    Args:
        dataset: see `debiaskd.data.packed.pack.pack`.
        split: its name.
        size, fit: of the stored images.
        classes, groups: names; None: any number >= 0.
        workers: processes that read.
        masks: whether masks are stored; False: they are left out; None: an item that has one is refused.
    """

    def __init__(
        self,
        dataset: Any,
        split: str,
        size: int,
        fit: str,
        classes: Sequence[str] | None,
        groups: Sequence[str] | None,
        workers: int,
        masks: bool | None = False,
    ) -> None:
        self.dataset, self.split, self.size, self.fit = dataset, split, size, fit
        self.classes, self.groups, self.workers = classes, groups, workers
        self.masks = masks
        self.paths = paths_of(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, numbers: range) -> Iterator[Sample | Fault]:
        """The items of these numbers, in this order."""
        if not self.workers:
            yield from (self[number] for number in numbers)
            return
        from torch.utils.data import DataLoader

        workers = min(self.workers, len(numbers))
        yield from DataLoader(self, batch_size=None, sampler=list(numbers), num_workers=workers, collate_fn=_as_it_is)  # type: ignore[arg-type]

    def image(self, number: int) -> Any:
        """The PIL image of an item.

        Raises:
            DataError: the item has none.
        """
        try:
            return _image(_fields(self.dataset[number])["image"])
        except Exception as error:  # whatever a user's data set stumbles over
            kind = "" if isinstance(error, Wrong) else f"{type(error).__name__}: "
            raise DataError(f"item {number}: {kind}{' '.join(str(error).split())}") from None

    def __getitem__(self, number: int) -> Sample | Fault:
        try:
            item = self.dataset[number]
        except Exception as error:  # whatever a user's data set stumbles over
            text = " ".join(f"{type(error).__name__}: {error}".split())
            return Fault(None if isinstance(error, IndexError) else "item that cannot be read", text[:300])
        try:
            return self._sample(number, _fields(item))
        except Wrong as error:
            return Fault(None, str(error))
        except (OSError, SyntaxError, ValueError) as error:  # of an image that is decoded only now
            return Fault("truncated or non-image file", " ".join(str(error).split())[:300])

    def _sample(self, number: int, item: Mapping[str, Any]) -> Sample:
        image = _image(item["image"])
        width, height = image.size
        target = self._target(item["target"])
        fitted, placed, corner = pixels.fit(image, self.size, self.fit)
        coords, labels, annotated = self._boxes(item, target, (height, width))
        coords = pixels.fit_boxes(coords, (height, width), self.size, placed, corner)
        problems: list[tuple[str, str]] = []
        found = None
        if item.get("mask") is not None and self.masks is not False:
            objects = labels if annotated else self._object_labels(item)
            known = masks_by_class(self._wanted(item["mask"]), (height, width), target, objects)
            own = [target] if isinstance(target, int) else np.flatnonzero(target).tolist()
            classes = {*own, *(own if objects is None else objects.tolist())}
            found = self._fitted(known, classes, (placed, corner), coords, labels, problems)
        if found is not None and not annotated:
            coords, labels, annotated = found.bounds, found.labels, True
        return Sample(
            fitted,
            coords,
            labels,
            np.zeros(len(coords), np.uint8),
            target,
            self._group(item.get("group")),
            annotated,
            (height, width),
            number,
            str(number) if self.paths is None else self.paths[number],
            None if found is None else found.words,
            None if found is None else found.labels,
            tuple(problems),
        )

    def _wanted(self, mask: Any) -> Any:
        if self.masks is None:
            raise Wrong("has a mask, and those before have none: say masks=True, or masks=False to leave masks out")
        return mask

    def _object_labels(self, item: Mapping[str, Any]) -> Any:
        """int64 [k], the classes of objects that have masks and no boxes; None: they are the image's own."""
        if item.get("box_labels") is None:
            return None
        labels = array_of(item["box_labels"], "box_labels")
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise Wrong(f"box_labels must be a class for each object, got {labels.dtype} {list(labels.shape)}")
        return np.array([self._class(int(k), "box_labels") for k in labels], np.int64)

    def _fitted(
        self,
        known: Mapping[int, Any],
        classes: Collection[int],
        place: tuple[tuple[int, int], tuple[int, int]],
        coords: Any,
        labels: Any,
        problems: list[tuple[str, str]],
    ) -> FittedMasks | None:
        """The masks as they are stored; None where none has a pixel and there are no boxes to take instead."""
        if known and not len(coords) and not any(mask.any() for mask in known.values()):
            problems.append((EMPTY, ""))
            return None
        boxes = (coords, labels, np.zeros(len(coords), np.uint8))
        return fit_classes(
            known, classes, self.size, *place, boxes, lambda kind, label: problems.append((kind, f"class {label}"))
        )

    def _target(self, value: Any) -> Any:
        array = array_of(value, "target")
        if array.ndim == 0 and array.dtype.kind in "iub":
            return self._class(int(array), "target")
        if array.ndim == 1 and len(array) and array.dtype.kind in "iubf" and np.isin(array, (0, 1)).all():
            if self.classes is not None and len(array) != len(self.classes):
                raise Wrong(f"target must have a 0 or 1 for each of {len(self.classes)} classes, got {len(array)}")
            return array.astype(np.uint8)
        shown = f"{array.dtype} {list(array.shape)}" if array.ndim else repr(value)
        raise Wrong(f"target must be a class's number, or a vector of 0 and 1 for each class, got {shown}")

    def _class(self, number: int, what: str) -> int:
        count = None if self.classes is None else len(self.classes)
        if number < 0 or (count is not None and number >= count):
            raise Wrong(f"{what} must lie in 0..{'' if count is None else count - 1}, got {number}")
        return number

    def _group(self, value: Any) -> int:
        if value is None:
            return -1
        if isinstance(value, str):
            if self.groups is None or value not in self.groups:
                known = "no groups were named" if self.groups is None else f"groups are {', '.join(self.groups)}"
                raise Wrong(f"group {value!r} is unknown: {known}")
            return list(self.groups).index(value)
        array = array_of(value, "group")
        if array.ndim or array.dtype.kind not in "iub":
            raise Wrong(f"group must be a number or a name, got {value!r}")
        count = None if self.groups is None else len(self.groups)
        if int(array) < 0 or (count is not None and int(array) >= count):
            raise Wrong(f"group must lie in 0..{'' if count is None else count - 1}, got {int(array)}")
        return int(array)

    def _boxes(self, item: Mapping[str, Any], target: Any, size: tuple[int, int]) -> tuple[Any, Any, bool]:
        """(int32 [k,4] in pixels of the image, int64 [k] labels, whether it is annotated)."""
        if item.get("boxes") is None:
            return np.zeros((0, 4), np.int32), np.zeros(0, np.int64), False
        rows = np.zeros((0, 4))
        if len(item["boxes"]):
            rows = array_of(item["boxes"], "boxes").astype(np.float64).reshape(-1, 4)
        for row in rows.tolist():
            if (fault := box_fault(row)) is not None:
                raise Wrong(f"boxes must be (x0, y0, x1, y1) in pixels, got {row}: {fault}")
        coords, inside = pixels.to_pixels(rows, *size)
        if not inside.all():
            outside = rows[~inside][0].tolist()
            raise Wrong(f"boxes must lie in the image of {size[1]}×{size[0]} pixels, got {outside}")
        if item.get("box_labels") is not None:
            labels = array_of(item["box_labels"], "box_labels")
            if labels.shape != (len(rows),) or labels.dtype.kind not in "iu":
                raise Wrong(f"box_labels must be a class for each of {len(rows)} boxes, got {list(labels.shape)}")
            return coords, np.array([self._class(int(k), "box_labels") for k in labels], np.int64), True
        if not isinstance(target, int):
            raise Wrong("box_labels must say the class of each box where an image may show several")
        return coords, np.full(len(rows), target, np.int64), True


def _as_it_is(item: Any) -> Any:
    return item


def _fields(item: Any) -> Mapping[str, Any]:
    if isinstance(item, Mapping):
        found = dict(item)
        if "target" not in found and "label" in found:
            found["target"] = found["label"]
        missing = [key for key in ("image", "target") if key not in found]
        if missing:
            raise Wrong(f"must have {' and '.join(missing)}, got a mapping with {', '.join(map(str, item))}")
        return found
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return {"image": item[0], "target": item[1]}
    count = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
    raise Wrong(f"must be (image, target) or a mapping with image and target, got {type(item).__name__}{count}")


def _image(value: Any) -> Any:
    from PIL import Image

    if isinstance(value, Image.Image):
        return pixels.rgb(value)
    if not isinstance(value, (torch.Tensor, np.ndarray)):
        raise Wrong(f"image must be a PIL image, an array or a tensor, got {type(value).__name__}")
    array = array_of(value, "image")
    shown = f"{array.dtype} {list(array.shape)}"
    if array.dtype.kind == "f":
        if array.size and not (array.min() >= 0 and array.max() <= 1):
            low, high = float(array.min()), float(array.max())
            raise Wrong(f"float images must lie in 0..1, got {low:.3g}..{high:.3g}; normalization is the recipe's")
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise Wrong(f"image must be uint8, or float in 0..1, got {shown}")
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or 0 in array.shape:
        raise Wrong(f"image must have the shape [H,W], [H,W,3] or [3,H,W], got {shown}")
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def names_of(dataset: Any) -> list[str] | None:
    """The names of its classes, as torchvision and Hugging Face data sets have them; None if it has none."""
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        found = getattr(features.get("target", features.get("label")), "names", None)
        return None if found is None else list(found)
    found = getattr(dataset, "classes", None)
    if isinstance(found, (list, tuple)) and found and all(isinstance(name, str) for name in found):
        return list(found)
    inner = getattr(dataset, "dataset", None)  # of a torch Subset
    return None if inner is None or inner is dataset else names_of(inner)


def source_name(dataset: Any) -> str:
    """What it is called in messages and in the manifest."""
    return f"{type(dataset).__module__}.{type(dataset).__qualname__}"


def paths_of(dataset: Any) -> list[str] | None:
    """Where its images come from, as torchvision's folders know it; None if that is not known."""
    found = getattr(dataset, "samples", None)
    if not isinstance(found, list) or len(found) != len(dataset):
        return None
    if not all(isinstance(one, tuple) and one and isinstance(one[0], str) for one in found):
        return None
    return [one[0] for one in found]
