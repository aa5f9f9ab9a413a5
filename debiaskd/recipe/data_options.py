"""The data of a recipe: its keys, and what they may be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from debiaskd.data.rand_augment import MOST


@dataclass
class Data:
    """Prepared images (`debiaskd prepare`).

    A split is named as it was prepared, "train", or a part of it, "train[:80%]" and "train[80%:]": images are taken
    in a random order that depends on the seed alone.

    Args:
        path: the folder that was prepared, in either format.
        url: where the chunks of data prepared for LitData lie that are not below `path`, "s3://bucket/birds-224": they
            are fetched as they are needed, and kept below `path`.
        train, validation: splits.
        test: what `debiaskd evaluate` measures on, unless it is told otherwise; nothing else looks at it.
        groups: left out: those that the data was prepared with. A CSV file with the columns path and bias (`debiaskd
            discover` writes one, `prepare folder` reads the same): its groups, for training and validation. "found":
            those that `discovery` finds. "none": no group is read. The test keeps those that it was prepared with.
        annotated_fraction: share of the training images whose boxes are known.
        dilate: enlarge training boxes by this share of their size on every side.
        jitter: noise on the boxes and masks of the training images, for studies of robustness: each side moves by up to
            this share of the object's width or height, always the same way for an image and `data.seed`.
        masks: where images were prepared with masks (`debiaskd prepare --masks`), guide into those and measure by
            those, in training, validation and test; images without a mask keep their boxes.
        seed: decides which parts of a split, and which annotated images, are meant.
        size: side of the images that the networks read, unless their `input.size` says otherwise or they read one
            size only; as prepared if it is left out.
        flip: mirror half of the training images.
        crop_scale: smallest and largest share of its area that a random crop of a training image takes; no crop if it
            is left out.
        color_jitter: brightness, contrast, saturation and hue of a training image change by random amounts up to these
            (torchvision's `ColorJitter`, in this order): three factors in 1 ± b, and a turn of the hue by a share of
            the circle up to 0.5; [0.4, 0.4, 0.4, 0.1], for one. Left out: colours stay.
        rand_augment: [operations, magnitude], such as [2, 9]: so many random operations on each training image, of a
            magnitude in 0..30 (torchvision's `RandAugment`), before color_jitter. Boxes and masks are sheared, moved
            and rotated with the image. Left out: none.
        mixup: alpha > 0, such as 0.2: each training image is blended with another one of its pass, by a share from
            Beta(alpha, alpha). Only for terms that can follow that: supervised, kd, match and sample, unweighted, with
            a teacher that is not cached. Left out: images are not blended.
        cutmix: alpha > 0, such as 1: a window of each training image shows another one; for the same terms. With mixup
            as well, each image is mixed in one of both ways. Left out: none does.
    """

    path: str
    url: str | None = None
    train: str = "train"
    validation: str = "val"
    test: str = "test"
    groups: str | None = None
    annotated_fraction: float = 1.0
    dilate: float = 0.0
    jitter: float = 0.0
    masks: bool = False
    seed: int = 0
    size: int | None = None
    flip: bool = True
    crop_scale: tuple[float, float] | None = None
    color_jitter: tuple[float, float, float, float] | None = None
    rand_augment: tuple[int, int] | None = None
    mixup: float | None = None
    cutmix: float | None = None

    @property
    def mixing(self) -> str | None:
        """The key that mixes images with others, if one does."""
        return "data.mixup" if self.mixup is not None else "data.cutmix" if self.cutmix is not None else None


def data_problems(data: Data) -> Iterator[str]:
    """What is wrong with the values themselves."""
    if not 0 < data.annotated_fraction <= 1:
        yield f"data.annotated_fraction: must be a share in (0, 1], got {data.annotated_fraction}"
    if data.url == "":
        yield "data.url: must say where the chunks lie, or be left out, got ''"
    if data.masks and data.dilate:
        yield f"data.dilate: enlarges boxes, and data.masks is true; got {data.dilate}"
    if data.crop_scale is not None and not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
        yield f"data.crop_scale: must be (smallest, largest) in (0, 1], got {data.crop_scale}"
    if not 0 <= data.jitter < float("inf"):
        yield f"data.jitter: must be a share >= 0, got {data.jitter}"
    if data.rand_augment is not None and not (data.rand_augment[0] >= 1 and 0 <= data.rand_augment[1] <= MOST):
        expected = f"[operations, magnitude] with operations >= 1 and magnitude in 0..{MOST}"
        yield f"data.rand_augment: must be {expected}, got {list(data.rand_augment)}"
    for key in ("mixup", "cutmix"):
        alpha = getattr(data, key)
        if alpha is not None and not 0 < alpha < float("inf"):
            yield f"data.{key}: must be a number > 0, got {alpha}"
    strength = data.color_jitter
    if strength is not None and not (all(0 <= value < float("inf") for value in strength) and strength[3] <= 0.5):
        yield f"data.color_jitter: must be four numbers >= 0, the last one (hue) at most 0.5, got {list(strength)}"
