"""Groups of prepared images from a CSV file, in place of those that the data was prepared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from debiaskd.data.packed import manifest
from debiaskd.data.packed.mapped import PackedDataset
from debiaskd.data.sources.names import split_name
from debiaskd.data.sources.problems import DataError
from debiaskd.data.sources.tables import read_csv


def image_names(whole: PackedDataset) -> list[str]:
    """The path of each image of a prepared split as `bias.csv` names it: from the folder on that was prepared.

    Where that folder held one folder for each split, the path begins with the split's folder; where it is not there any
    more, with the split's name.

    Where images are drawn and not files, two may have the same path: the second is "path (2)".
    """
    paths = _numbered(whole.paths())
    source = manifest.read(whole.path)["source"]
    root, prefix = Path(source["path"]), f"{whole.split}/"
    if source["kind"] == "folder" and root.is_dir() and paths:
        if (root / paths[0]).is_file():
            prefix = ""
        else:
            folders = sorted(entry.name for entry in root.iterdir() if split_name(entry.name) == whole.split)
            prefix = next((f"{name}/" for name in folders if (root / name / paths[0]).is_file()), prefix)
    return [prefix + path for path in paths]


def _numbered(paths: Sequence[str]) -> list[str]:
    """Paths that occur again with their number behind them."""
    seen: Counter[str] = Counter()
    found = []
    for path in paths:
        seen[path] += 1
        found.append(path if seen[path] == 1 else f"{path} ({seen[path]})")
    return found


def read_groups(whole: PackedDataset, file: Path) -> tuple[Tensor | None, tuple[str, ...]]:
    """The group of each image of a prepared split, from a CSV file with the columns path and bias.

    A group is a class and a bias, class * number of biases + bias, the biases of the whole file sorted by name, as
    `debiaskd prepare folder` numbers them. Paths are as `image_names` has them, or begin with the split's name, or are
    those below the folder of the split's images; one way in the whole file.

    Args:
        whole: the split, of one class per image.
        file: for example the `bias.csv` of `debiaskd discover`; further columns are not read.

    Returns:
        (int64 [N], or None if the file names no image of this split; names of the groups).

    Raises:
        DataError: no such file, fewer than two biases, rows that contradict each other, or an image without a row.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such file; groups must be a CSV file with the columns path, bias")
    known: dict[str, str] = {}
    for number, row in read_csv(file, ("path", "bias")):
        name, bias = row["path"].strip(), row["bias"].strip()
        if not bias:
            raise DataError(f"{file}, line {number}: bias must be a name, got nothing")
        if known.setdefault(name, bias) != bias:
            raise DataError(f"{file}, line {number}: {name} has bias {bias!r}, and {known[name]!r} in an earlier line")
    biases = {name: i for i, name in enumerate(sorted(set(known.values())))}
    if len(biases) < 2:
        raise DataError(f"{file}: must have two biases or more, got {', '.join(biases) or 'no rows'}")
    names = tuple(f"{label}, {bias}" for label in whole.classes for bias in biases)
    below = _numbered(whole.paths())
    for paths in (image_names(whole), [f"{whole.split}/{path}" for path in below], below):
        missing = [path for path in paths if path not in known]
        if len(missing) == len(paths):
            continue
        if missing:
            raise DataError(
                f"{file}: must have a row for each of the {len(paths)} images of {whole.split}, {len(missing)} have "
                f"none, such as {missing[0]}"
            )
        found = torch.tensor([biases[known[path]] for path in paths])
        return whole.target * len(biases) + found, names
    return None, names
