"""Groups that were found, not annotated: what they are, how sure, how they compare with known ones."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from debiaskd.utils import checks, files

#: What the names of found clusters begin with, in files and in names of groups.
FOUND = "found-"


def found_names(classes: Sequence[str], clusters: int) -> tuple[str, ...]:
    """Names of the groups that `FoundGroups.ids` numbers: "gull, found-0".

    Example:
        >>> from debiaskd.bias import found_names
        >>> found_names(["gull", "tern"], 2)
        ('gull, found-0', 'gull, found-1', 'tern, found-0', 'tern, found-1')
    """
    return tuple(f"{label}, {FOUND}{cluster}" for label in classes for cluster in range(clusters))


def are_found(groups: Sequence[str]) -> bool:
    """Whether groups of these names were found by `debiaskd discover` rather than annotated.

    Example:
        >>> from debiaskd.bias import are_found
        >>> are_found(["gull, found-0", "gull, found-1"]), are_found(["gull, water", "gull, land"])
        (True, False)
    """
    return any(name.rpartition(", ")[2].startswith(FOUND) for name in groups)


@dataclass(frozen=True)
class FoundGroups:
    """A cluster within its class for each of N samples.

    Attributes:
        labels: int64 [N], the classes.
        clusters: int64 [N] from 0 within each class, the largest first.
        confidence: float64 [N] in [0,1], 1 − (distance to the own cluster's centre) / (distance to the next one's); 1
            in a class of one cluster.
    """

    labels: Tensor
    clusters: Tensor
    confidence: Tensor

    def __post_init__(self) -> None:
        for name in ("clusters", "confidence"):
            checks.shape(name, getattr(self, name), "[N]", [len(self.labels)])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def groups(self) -> Tensor:
        """int64 [N] from 0: one number for each pair of class and cluster that occurs, by class, then by cluster."""
        pairs = torch.stack([self.labels, self.clusters], 1)
        numbers: Tensor = pairs.unique(dim=0, return_inverse=True)[1]
        return numbers

    def ids(self, clusters: int) -> Tensor:
        """int64 [N], class * clusters + cluster: the same number in every split, whatever occurs there."""
        if len(self) and int(self.clusters.max()) >= clusters:
            raise ValueError(f"clusters must be > {int(self.clusters.max())}, the largest that occurs, got {clusters}")
        return self.labels * clusters + self.clusters

    def sizes(self) -> dict[tuple[int, int], int]:
        """Samples of each (class, cluster)."""
        pairs, counts = torch.stack([self.labels, self.clusters], 1).unique(dim=0, return_counts=True)
        return {(int(label), int(cluster)): int(count) for (label, cluster), count in zip(pairs, counts)}

    def score(self, known: Tensor) -> dict[str, float]:
        """Agreement with annotated groups.

        Args:
            known: int64 [N], the annotated group of each sample. Two samples of different classes may share a number
                (an annotated bias attribute): classes are told apart here.

        Returns:
            adjusted_rand_index: within each class that has more than one known group, averaged by its samples; the
                class itself was given and counts for nothing. 1 is perfect, 0 chance.
            smallest_group_recall: of the smallest known group, the share among as many samples as it has, taken from
                its class's smallest cluster on, the surest first.
            smallest_group: samples of that group.

        Raises:
            TypeError, ValueError: known is not int64 [N], or no class has two known groups.
        """
        from sklearn.metrics import adjusted_rand_score

        checks.shape("known", checks.tensor("known", known), "[N]", [len(self)])
        if known.dtype != torch.int64:
            raise TypeError(f"known must be int64, got {known.dtype}")
        found, samples = 0.0, 0
        smallest: tuple[int, int, int] | None = None
        for label in self.labels.unique().tolist():
            of_class = self.labels == label
            groups, counts = known[of_class].unique(return_counts=True)
            if len(groups) < 2:
                continue
            index = adjusted_rand_score(known[of_class].tolist(), self.clusters[of_class].tolist())
            found, samples = found + index * int(of_class.sum()), samples + int(of_class.sum())
            count, group = min(zip(counts.tolist(), groups.tolist()))
            if smallest is None or count < smallest[0]:
                smallest = (count, group, label)
        if smallest is None:
            raise ValueError("known must have two groups in some class, got one in each")
        count, group, label = smallest
        of_class = (self.labels == label).nonzero()[:, 0]
        # The last cluster is the smallest. lexsort: by cluster first, then by confidence.
        order = of_class[self.confidence[of_class].argsort(descending=True, stable=True)]
        order = order[self.clusters[order].argsort(descending=True, stable=True)][:count]
        recall = float((known[order] == group).double().mean())
        return {
            "adjusted_rand_index": found / samples,
            "smallest_group_recall": recall,
            "smallest_group": float(count),
        }

    def to_csv(self, path: Path | str, names: Sequence[str], classes: Sequence[str] | None = None) -> None:
        """Write `bias.csv` as `debiaskd prepare folder` reads it, with two more columns.

        Args:
            path: of the file: path, bias, class, confidence. The bias is `found-0`, `found-1`, …: the cluster within
                the class.
            names: [N], each image's path.
            classes: names of the classes; None: their numbers.
        """
        if len(names) != len(self):
            raise ValueError(f"names must be of N={len(self)} images, got {len(names)}")

        def write(unfinished: Path) -> None:
            with open(unfinished, "w", newline="", encoding="utf-8") as file:
                rows = csv.writer(file)
                rows.writerow(["path", "bias", "class", "confidence"])
                for name, label, cluster, sure in zip(
                    names, self.labels.tolist(), self.clusters.tolist(), self.confidence.tolist()
                ):
                    rows.writerow([name, f"{FOUND}{cluster}", classes[label] if classes else label, f"{sure:.4f}"])

        files.write(Path(path), write)
