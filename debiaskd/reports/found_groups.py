"""Groups that were found in a split: their sizes, accuracies and agreement, a CSV file, and a page to judge them by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.attribution.heat_map import heat_map
from debiaskd.bias import FoundGroups, found_names
from debiaskd.data.group_files import image_names
from debiaskd.evaluation.discover import Judge, brief_stage, early_losses, find, of_module, of_run, opened, plain_stage
from debiaskd.models.input import InputContract
from debiaskd.recipe import Data
from debiaskd.reports.gallery import data_uri, glowing
from debiaskd.reports.page import render
from debiaskd.terms import GuideOptions, make_guide
from debiaskd.training.batches import InputTransform, Split
from debiaskd.training.run import open_run
from debiaskd.utils import files
from debiaskd.version import __version__

#: Images of each kind that the page shows of a group, how wide they are at most, and groups that it shows at most.
SHOWN, SIDE, GROUPS = 4, 112, 24


@dataclass(frozen=True)
class Groups:
    """Groups within each class, found in the N images of a split. They are found, not known: look at them first.

    Attributes:
        found: class, cluster and confidence of each image; see `debiaskd.bias.FoundGroups`.
        correct: bool [N], whether the model that they were found from predicts the image rightly.
        names: [N], each image's path, as `bias.csv` has it.
        classes: names.
        method: "environments" or "clusters".
        split, judge: the images; the model.
    """

    found: FoundGroups
    correct: Tensor
    names: tuple[str, ...]
    classes: tuple[str, ...]
    method: str
    split: Split = field(repr=False)
    judge: Judge = field(repr=False)

    def __len__(self) -> int:
        return len(self.found)

    @property
    def groups(self) -> Tensor:
        """int64 [N], class * G + cluster, with G the largest number of clusters in a class."""
        return self.found.ids(self._clusters)

    @property
    def group_names(self) -> tuple[str, ...]:
        """Of the numbers in `groups`: "gull, found-0"."""
        return found_names(self.classes, self._clusters)

    @property
    def _clusters(self) -> int:
        return int(self.found.clusters.max()) + 1 if len(self) else 1

    def sizes(self) -> dict[str, int]:
        """Images of each group that has any."""
        return {self._name(*key): size for key, size in self.found.sizes().items()}

    def accuracy(self) -> dict[str, float]:
        """Of each group, the share that the model predicts rightly."""
        return {self._name(*key): float(self.correct[self._member(*key)].double().mean()) for key in self.found.sizes()}

    def score(self, known: Tensor | None = None) -> dict[str, float]:
        """Agreement with known groups; see `debiaskd.bias.FoundGroups.score`.

        Args:
            known: int64 [N]; None: the groups that the data was prepared with.

        Raises:
            ValueError: there are none, or one in each class.
        """
        known = self.split.groups if known is None else known
        if known is None:
            raise ValueError(f"known must be given: {self.split.whole.path} was prepared without groups")
        return self.found.score(known)

    def to_csv(self, path: Path | str) -> None:
        """Write `bias.csv`: path, bias, class, confidence. `debiaskd prepare folder` and `data.groups` read it."""
        self.found.to_csv(path, self.names, self.classes)

    def gallery(self, path: Path | str) -> None:
        """Write one HTML file, which loads nothing from elsewhere: of each group its size and accuracy, and its surest
        and least sure images with the evidence for their class. Groups that are predicted worst come first."""
        files.write_text(Path(path), self._page())

    def _name(self, label: int, cluster: int) -> str:
        return self.group_names[label * self._clusters + cluster]

    def _member(self, label: int, cluster: int) -> Tensor:
        return (self.found.labels == label) & (self.found.clusters == cluster)

    def _page(self) -> str:
        accuracy, sizes = self.accuracy(), self.found.sizes()
        several = {label for label, cluster in sizes if cluster > 0}
        order = sorted(sizes, key=lambda key: (accuracy[self._name(*key)], key))
        apart = [key for key in order if key[0] in several]
        labels = list(dict.fromkeys(label for label, _ in apart))  # the class with the worst group first
        shown = [key for label in labels for key in apart if key[0] == label][:GROUPS]
        sections = [self._section(key, accuracy, sizes) for key in shown]
        agreement = None
        if self.split.groups is not None:
            try:
                agreement = self.score()
            except ValueError:  # one known group in each class
                agreement = None
        return render(
            "found_groups.html.j2",
            sections=sections,
            left_out=len(apart) - len(shown),
            whole=[self.classes[label] for label, _ in sizes if label not in several],
            method=self.method,
            model=self.judge.name,
            data=self.split.whole.path.resolve().name,
            split=self.split.name,
            count=len(self),
            agreement=agreement,
            version=__version__,
        )

    def _section(
        self, key: tuple[int, int], accuracy: dict[str, float], sizes: dict[tuple[int, int], int]
    ) -> dict[str, Any]:
        members = self._member(*key).nonzero()[:, 0]
        order = members[self.found.confidence[members].argsort(descending=True, stable=True)]
        surest, least = order[:SHOWN], order[max(SHOWN, len(order) - SHOWN) :].flip(0)
        name = self._name(*key)
        of_class = sum(size for (label, _), size in sizes.items() if label == key[0])
        return {
            "name": name,
            "size": sizes[key],
            "share": 100 * sizes[key] / of_class,
            "accuracy": 100 * accuracy[name],
            "rows": [
                (title, self._images(rows)) for title, rows in (("surest", surest), ("least sure", least)) if len(rows)
            ],
        }

    def _images(self, rows: Tensor) -> list[dict[str, Any]]:
        stored = self.split.whole.__getitems__(self.split.numbers[rows])
        judge = self.judge
        batch = InputTransform(judge.contract, judge.device)(stored)
        guide = make_guide(GuideOptions(layer=judge.layer or "Final"), judge.model)
        maps = guide.attribute(batch.images, self.split.target[rows].to(judge.device))
        glow = glowing(stored.images, heat_map(maps, (stored.images.shape[2], stored.images.shape[3])))
        return [
            {
                "name": self.names[row],
                "confidence": float(self.found.confidence[row]),
                "right": bool(self.correct[row]),
                "image": data_uri(stored.images[i], SIDE),
                "evidence": data_uri(glow[i], SIDE),
            }
            for i, row in enumerate(rows.tolist())
        ]


def discover(
    model_or_run: Any,
    data: Path | str | None = None,
    *,
    split: str = "train",
    method: str = "environments",
    stage: str | None = None,
    early_loss: Tensor | None = None,
    contract: InputContract | None = None,
    most: int = 4,
    smallest: int = 20,
    seed: int = 0,
) -> Groups:
    """Find groups within each class from a plainly trained model, without annotation of them.

    Args:
        model_or_run: a module from images to logits [N,K]; or a run's folder, or a `Run`. The model must be trained
            plainly and briefly, or not on these images: once it has fitted them, nothing tells them apart.
        data: the prepared folder; None: that of the run.
        split: whose images, "train" or "train[:10%]".
        method: "environments", two in each class, by the model's logits (EIIL); or "clusters" of its features and of
            early losses, where they are known (GEORGE).
        stage: of the run, whose model; None: the first of discovery, identification, teacher-erm, pretraining and a
            plain student that there is.
        early_loss: [N], for clusters: each image's loss after the first epochs; None: that of the run's briefly trained
            model, if it has one.
        contract: what a module reads; None: its `pretrained_cfg`'s, or ImageNet's mean and std at the data's size.
        most, smallest, seed: of clusters; see `debiaskd.bias.find_groups`.

    Returns:
        `Groups`.

    Raises:
        RunError, RecipeError, DataError, NetworkError: no such run, stage, data or split.
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> groups = dk.discover("runs/erm", "birds-224")  # doctest: +SKIP
        >>> groups.sizes(), groups.score()  # doctest: +SKIP
        >>> groups.to_csv("bias.csv"), groups.gallery("groups.html")  # doctest: +SKIP

    Source: Creager et al. 2021 (arXiv 2010.07249); Sohoni et al. 2020 (arXiv 2011.12945).
    """
    if isinstance(model_or_run, nn.Module):
        if stage is not None:
            raise ValueError(f"stage must be left out for a module, got {stage!r}")
        if data is None:
            raise ValueError("data must be a prepared folder where a module is given, got None")
        images = opened(Data(str(data)), split)
        judge, brief = of_module(model_or_run, images.whole.size, contract), None
    else:
        if contract is not None:
            raise ValueError("contract must be left out for a run, which knows what its model reads")
        folder = Path(getattr(model_or_run, "folder", model_or_run))
        used, data = stage or plain_stage(folder), open_run(folder).data.path if data is None else data
        judge, images = of_run(folder, used, str(data)), opened(_data(folder, data), split)
        other = brief_stage(folder, used) if method == "clusters" and early_loss is None else None
        brief = None if other is None else of_run(folder, other, str(data))
    if brief is not None:
        early_loss = early_losses(brief, images)
    logits, pooled = judge.outputs(images)
    found = find(logits, pooled, images, method, early_loss, most=most, smallest=smallest, seed=seed)
    named = image_names(images.whole)
    return Groups(
        found,
        logits.argmax(1) == images.target,
        tuple(named[number] for number in images.numbers.tolist()),
        tuple(images.whole.classes),
        method,
        images,
        judge,
    )


def _data(folder: Path, data: Path | str) -> Data:
    return replace(open_run(folder).data, path=str(data), url=None)


def joined(parts: Sequence[Groups]) -> tuple[FoundGroups, list[str]]:
    """The groups of several splits together, and the names of their images."""
    tensors = [
        torch.cat([getattr(part.found, name) for part in parts]) for name in ("labels", "clusters", "confidence")
    ]
    return FoundGroups(*tensors), [name for part in parts for name in part.names]
