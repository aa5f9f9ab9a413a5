"""CIFAR-10 and CIFAR-100 as they are distributed, in the binary or the Python version, or as npz files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from debiaskd.data.sources import cifar_files, pickled
from debiaskd.data.sources.cifar_files import Batch, Images
from debiaskd.data.sources.records import DataError, Problems, Source, Split, choose_splits

#: How many classes each column of labels has.
_COUNTS = {"labels": 10, "fine_labels": 100, "coarse_labels": 20}


@dataclass(frozen=True)
class Layout:
    """One of the forms that it is distributed in.

    `folder` is what its archive unpacks to. `columns` are the labels in the order of their bytes, by what `--labels`
    calls them; `names` the files that name their classes, of which npz needs none.
    """

    title: str
    folder: str
    read: Callable[[Path, Sequence[str]], Batch]
    files: Mapping[str, tuple[str, ...]]
    columns: Mapping[str, str]
    names: Mapping[str, str]


_TEN, _HUNDRED = {"": "labels"}, {"coarse": "coarse_labels", "fine": "fine_labels"}
LAYOUTS = (
    Layout(
        "CIFAR-10, binary version",
        "cifar-10-batches-bin",
        cifar_files.binary,
        {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        _TEN,
        {"": "batches.meta.txt"},
    ),
    Layout(
        "CIFAR-10, Python version",
        "cifar-10-batches-py",
        cifar_files.python,
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        _TEN,
        {"": "batches.meta"},
    ),
    Layout(
        "CIFAR-100, binary version",
        "cifar-100-binary",
        cifar_files.binary,
        {"train": ("train.bin",), "test": ("test.bin",)},
        _HUNDRED,
        {"coarse": "coarse_label_names.txt", "fine": "fine_label_names.txt"},
    ),
    Layout(
        "CIFAR-100, Python version",
        "cifar-100-python",
        cifar_files.python,
        {"train": ("train",), "test": ("test",)},
        _HUNDRED,
        {"coarse": "meta", "fine": "meta"},
    ),
)


def read(path: Path, problems: Problems, *, splits: Sequence[str] | None = None, labels: str | None = None) -> Source:
    """CIFAR-10 or CIFAR-100. No image is annotated.

    Args:
        path: the folder that holds the files, or the one that the archive was unpacked in. Binary version
            (`data_batch_1.bin`, …, `batches.meta.txt`; `train.bin`, `test.bin`, `fine_label_names.txt`, …), Python
            version (`data_batch_1`, …, `batches.meta`; `train`, `test`, `meta`), whose pickles are read without
            running anything that they name, or `train*.npz` and `test*.npz` with the arrays images uint8
            [N,32,32,3], labels [N] and classes [K].
        problems: collects what is passed over.
        splits: among "train" and "test"; None: those that are there.
        labels: of CIFAR-100: "fine", 100 classes, as with None, or "coarse", 20.

    Raises:
        DataError: no or several of these; a file is missing, damaged or another; `labels` without CIFAR-100.
    """
    folder, layout = _layout(path)
    if labels is not None and labels not in layout.columns:
        raise DataError(f"labels must be 'fine' or 'coarse' of CIFAR-100, got {labels!r} with {layout.title}")
    labels = labels or ("fine" if "fine" in layout.columns else "")
    present = [name for name, files in layout.files.items() if any((folder / file).is_file() for file in files)]
    classes = _names(folder, layout, labels) if layout.names else ()
    made = {}
    for name in choose_splits(present, splits, path, lambda: present):
        batches = [_batch(folder / file, layout) for file in layout.files[name]]
        for batch in batches:
            classes = classes or batch.classes
            if batch.classes not in ((), classes):
                raise DataError(f"{batch.file}: its classes differ from those of the other split")
        made[name] = _split(name, folder, batches, layout.columns[labels], len(classes), problems)
        if not len(made[name]):
            raise DataError(f"{batches[0].file}: there are no images in it{problems.why()}")
    return Source("cifar", path, classes, False, (), made, {"labels": labels} if labels else {})


def _layout(path: Path) -> tuple[Path, Layout]:
    found = []
    for layout in LAYOUTS:
        for folder in (path, path / layout.folder):
            if any((folder / file).is_file() for files in layout.files.values() for file in files):
                found.append((folder, layout))
    packed = sorted(path.glob("*.npz"))
    pairs = {name: [file for file in packed if file.name.lower().startswith(name)] for name in ("train", "test")}
    for name, files in pairs.items():
        if len(files) > 1:
            raise DataError(f"{path}: several {name}*.npz: {', '.join(file.name for file in files)}")
    present = {name: (files[0].name,) for name, files in pairs.items() if files}
    if present:
        found.append((path, Layout("npz files", "", cifar_files.npz, present, _TEN, {})))
    if len(found) > 1:
        raise DataError(f"{path}: holds {'; '.join(layout.title for _, layout in found)}; pass the folder of one")
    if not found:
        raise DataError(
            f"{path}: no CIFAR here: neither data_batch_1.bin nor data_batch_1 (CIFAR-10), neither train.bin nor train "
            "(CIFAR-100), nor train*.npz"
        )
    return found[0]


def _names(folder: Path, layout: Layout, labels: str) -> tuple[str, ...]:
    file, column = folder / layout.names[labels], layout.columns[labels]
    if not file.is_file():
        raise DataError(f"{file}: no such file; it names the classes")
    if layout.read is cifar_files.python:
        listed = pickled.load(file).get(column.replace("labels", "label_names"))
        found = [pickled.text(name) for name in listed] if isinstance(listed, list) else []
    else:
        found = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    names = tuple(name for name in found if name)
    if len(names) != _COUNTS[column]:
        raise DataError(f"{file}: must name {_COUNTS[column]} classes, got {len(names)}")
    return names


def _batch(file: Path, layout: Layout) -> Batch:
    if not file.is_file():
        raise DataError(f"{file}: no such file; it is part of {layout.title}")
    return layout.read(file, tuple(layout.columns.values()))


def _split(
    name_of_split: str, root: Path, batches: Sequence[Batch], column: str, classes: int, problems: Problems
) -> Split:
    images = Images(batches)
    split, tally = Split(root, images), problems.tally(name_of_split, "images")
    for index, batch in enumerate(batches):
        for row, label in enumerate(batch.labels[column].tolist()):
            name = f"{batch.file.name}:{row}"
            tally.total += 1
            if 0 <= label < classes:
                images.add(index, row)
                split.add(name, target=label, annotated=False)
            else:
                problems.add("unknown category", f"{name}: {label}", tally)
    return split
