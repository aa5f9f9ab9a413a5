"""Small data sets whose images are not files of their own, and CelebA, as they are distributed."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from data_trees import picture
from numpy.typing import NDArray

# -- CelebA --------------------------------------------------------------------------------------------------------

ATTRIBUTES = ("Bald", "Blond_Hair", "Brown_Hair", "Male", "Young")


def celeba(root: Path, rows: Sequence[tuple[Any, Any, Any]] | None = None, *, csv: bool = False) -> Path:
    """Rows are (Blond_Hair, Male, partition); image i is 00000i.jpg. `csv`: as Kaggle has it."""
    rows = [(2 * (i % 2) - 1, 2 * (i // 2 % 2) - 1, i % 3) for i in range(12)] if rows is None else rows
    folder = root / "img_align_celeba" / "img_align_celeba" if csv else root / "img_align_celeba"
    names = [f"{i:06d}.jpg" for i in range(len(rows))]
    for i, name in enumerate(names):
        picture(folder / name, 18, 22, seed=i)
    values = [(name, -1, blond, 1, male, -1) for name, (blond, male, _) in zip(names, rows)]
    if csv:
        lines = [",".join(("image_id", *ATTRIBUTES)), *(",".join(map(str, row)) for row in values)]
        parts = ["image_id,partition", *(f"{name},{part}" for name, (_, _, part) in zip(names, rows))]
    else:
        lines = [str(len(rows)), " ".join(ATTRIBUTES) + " ", *("  ".join(map(str, row)) for row in values)]
        parts = [f"{name} {part}" for name, (_, _, part) in zip(names, rows)]
    suffix = "csv" if csv else "txt"
    (root / f"list_attr_celeba.{suffix}").write_text("\n".join(lines) + "\n")
    (root / f"list_eval_partition.{suffix}").write_text("\n".join(parts) + "\n")
    return root


# -- CIFAR ---------------------------------------------------------------------------------------------------------

TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HUNDRED = tuple(f"fine {i}" for i in range(100))
TWENTY = tuple(f"coarse {i}" for i in range(20))
LAYOUTS = ("binary", "python", "npz")


def cifar_pictures(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 [count,32,32,3] of noise."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


def planes(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)).reshape(len(pictures), 3072)


class _Python2(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)  # type: ignore[attr-defined]
        self.memoize(value)  # type: ignore[attr-defined]

    dispatch[bytes] = save_string


def python2_pickle(value: Any) -> bytes:
    """As CIFAR's are: protocol 2, with numpy's module by the name that it had then."""
    content = io.BytesIO()
    _Python2(content, 2).dump(value)
    return content.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar10(root: Path, layout: str, train: Sequence[int], test: Sequence[int], *, pixels: Any = None) -> Path:
    """`train` and `test` are the labels; their images are those of `cifar_pictures(n, 0)` and `(n, 1)`, or of
    `pixels`, a pair. The five batches have as many images each as there are, or one less."""
    root.mkdir(parents=True, exist_ok=True)
    shown = pixels or (cifar_pictures(len(train), 0), cifar_pictures(len(test), 1))
    if layout == "npz":
        for name, labels, images in zip(("train_1.npz", "test_1.npz"), (train, test), shown):
            np.savez(root / name, images=images, labels=np.array(labels, np.int64), classes=np.array(TEN))
        return root
    parts = [(f"data_batch_{i + 1}", rows) for i, rows in enumerate(np.array_split(np.arange(len(train)), 5))]
    batches = [(name, shown[0][rows], [train[row] for row in rows]) for name, rows in parts]
    for name, images, labels in [*batches, ("test_batch", shown[1], list(test))]:
        if layout == "binary":
            records = np.concatenate([np.array(labels, np.uint8).reshape(-1, 1), planes(images)], 1)
            (root / f"{name}.bin").write_bytes(records.tobytes())
        else:
            batch = {b"batch_label": b"some", b"labels": labels, b"data": planes(images), b"filenames": [b"a.png"]}
            (root / name).write_bytes(python2_pickle(batch))
    if layout == "binary":
        (root / "batches.meta.txt").write_text("\n".join(TEN) + "\n\n")
    else:
        meta = {b"num_cases_per_batch": 2, b"label_names": [name.encode() for name in TEN]}
        (root / "batches.meta").write_bytes(python2_pickle(meta))
    return root


def cifar100(root: Path, layout: str, fine: Sequence[int], coarse: Sequence[int]) -> Path:
    """The same labels in train and test; images are those of `cifar_pictures(n, 0)` and `(n, 1)`."""
    root.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("train", "test")):
        images = planes(cifar_pictures(len(fine), seed))
        if layout == "binary":
            labels = np.array([coarse, fine], np.uint8).T
            (root / f"{name}.bin").write_bytes(np.concatenate([labels, images], 1).tobytes())
        else:
            batch = {b"data": images, b"fine_labels": list(fine), b"coarse_labels": list(coarse)}
            (root / name).write_bytes(python2_pickle(batch))
    if layout == "binary":
        (root / "fine_label_names.txt").write_text("\n".join(HUNDRED))
        (root / "coarse_label_names.txt").write_text("\n".join(TWENTY))
    else:
        names = {b"fine_label_names": HUNDRED, b"coarse_label_names": TWENTY}
        (root / "meta").write_bytes(python2_pickle({k: [name.encode() for name in v] for k, v in names.items()}))
    return root


# -- MNIST ---------------------------------------------------------------------------------------------------------


def mnist_digits(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 [count,28,28]: a bar of random place and size, ink 255, with one pixel of blur around it."""
    made = np.zeros((count, 28, 28), np.uint8)
    for image, (y, x, h, w) in zip(
        made, np.random.default_rng(seed).integers([4, 4, 8, 3], [8, 10, 16, 8], (count, 4))
    ):
        image[y - 1 : y + h + 1, x - 1 : x + w + 1] = 20
        image[y : y + h, x : x + w] = 255
    return made


def idx(values: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape) + values.tobytes()


def mnist(root: Path, labels: Sequence[int], *, name: str = "t10k", packed: bool = True, seed: int = 0) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    images = mnist_digits(len(labels), seed)
    for kind, values in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", np.array(labels, np.uint8))):
        content = idx(values)
        file = root / f"{name}-{kind}{'.gz' if packed else ''}"
        file.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return root


def mnist_on_cifar(root: Path, layout: str = "npz", *, grey: int | None = None, both: bool = False) -> Path:
    """100 digits (with `both` as many of either set) and 60 + 40 photographs; `grey`: all of them of this level."""
    mnist(root / "mnist", [i % 10 for i in range(100)])
    if both:
        mnist(root / "mnist", [i % 10 for i in range(100)], name="train", packed=False, seed=1)
    pixels = None if grey is None else tuple(np.full((count, 32, 32, 3), grey, np.uint8) for count in (60, 40))
    cifar10(root / "cifar10", layout, [i % 10 for i in range(60)], [i % 10 for i in range(40)], pixels=pixels)
    return root
