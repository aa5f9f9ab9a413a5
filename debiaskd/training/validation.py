"""Evaluate a model on a split: metrics as fractions in [0,1], over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.attribution.guide import Guide
from debiaskd.bias import are_found
from debiaskd.boxes import Boxes
from debiaskd.data import Batch
from debiaskd.ops.ignore import judged
from debiaskd.recipe import Network, Recipe
from debiaskd.terms import GuideOptions, make_guide
from debiaskd.training.batches import Split, SplitLoader

#: Where boxes count as small, middling or large: shares of the image that they cover.
SIZES = (0.1, 0.3)


def has_boxes(split: Split) -> bool:
    """Whether a split has annotated boxes of its labels to compare attributions with."""
    labelled = split.target.any(1) if split.whole.multi_label else torch.ones(len(split), dtype=torch.bool)
    return bool((split.boxes.annotated & labelled).any()) and bool(len(split.boxes.coords))


def available_metrics(split: Split) -> tuple[str, ...]:
    """Names of the metrics that selection can use on a split: those that are defined for every model."""
    if split.whole.multi_label:
        found: tuple[str, ...] = ("f1",) if bool(split.target.any()) else ()
    else:
        found = ("accuracy", "worst_group_accuracy") if annotated(split) else ("accuracy",)
        found = (*found, "worst_environment_accuracy") if split.environment_names else found
    return (*found, "epg", "iou") if has_boxes(split) else found


def annotated(split: Split) -> bool:
    """Whether the groups of a split are annotated, and not found."""
    return split.groups is not None and not are_found(split.whole.groups)


def attribution_options(recipe: Recipe, stage: str) -> GuideOptions:
    """The layer and method of a stage's attributions: those of the student's guidance; the last feature map for other
    models."""
    if stage in ("student", "pretraining") and recipe.terms.guide is not None:
        return recipe.terms.guide
    network: Network = recipe.teacher if stage.startswith("teacher") and recipe.teacher else recipe.student
    named = None if stage == "student" and recipe.transplant is not None else network.layer
    return GuideOptions(layer=named or "Final")


@dataclass(frozen=True)
class Judged:
    """What a model makes of the N images of a split that this process reads, in order, on the CPU.

    Attributes:
        correct: bool [N].
        confidence: float32 [N], the probability of the predicted class.
        groups: int64 [N], or None.
        index: int64 [N], numbers in the prepared split.
    """

    correct: Tensor
    confidence: Tensor
    groups: Tensor | None
    index: Tensor


class Evaluator:
    """Evaluate models on the images of a split.

    Args:
        loader: in order, not augmented.
        training_groups: int64 [M] of the training split; None: not known, the adjusted accuracy is left undefined.
        guide: layer and method of the attributions.
        threshold: of the IoU; None: the best of a grid, as is right on validation.
        maps: compare attributions with boxes, where there are any: EPG and IoU.
        autocast: makes the context in which the model runs, of the precision that it was trained in.

    Attributes:
        judged: what the model that was evaluated last made of each image; None where images show several classes.
    """

    judged: Judged | None = None

    def __init__(
        self,
        loader: SplitLoader,
        training_groups: Tensor | None,
        guide: GuideOptions,
        threshold: float | None = None,
        *,
        maps: bool = True,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.autocast = autocast
        self.loader, self.training_groups = loader, training_groups
        self.guide, self.threshold = guide, threshold
        split = loader.split
        self.has_boxes = maps and has_boxes(split)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The model's metrics, NaN where undefined. The model is in evaluation mode and on the loader's device."""
        metrics = _Metrics(self)
        guide = make_guide(self.guide, model) if self.has_boxes else None
        self.loader.sampler.start_at(0, 0)
        for batch in self.loader.dataloader:
            placed = self.loader.transform(batch)
            with torch.no_grad(), self.autocast():
                metrics.classes(model(placed.images), placed)
            if guide is not None:
                with (
                    self.autocast(),
                    torch.compiler.set_stance("force_eager"),
                ):  # hooks do not see inner layers of a compiled model
                    found = attributions(guide, placed)
                for one in found:
                    metrics.maps(*one)
        self.judged = metrics.judged()
        return metrics.compute()


def attributions(guide: Guide, batch: Batch) -> list[tuple[Tensor, Boxes, Boxes | None]]:
    """The maps [N,h,w] of each image's first label, of its second, and so on, with that class's boxes and the areas
    of that class to be ignored."""
    if batch.target.dim() == 1:
        return [(guide.attribute(batch.images, batch.target), *judged(batch.boxes, batch.target, batch.ignore))]
    most = int(batch.target.sum(1).max()) if len(batch) else 0
    if not most:
        return []
    found = batch.target.float().topk(most, 1)
    target = torch.where(found.values > 0, found.indices, -1)
    maps = guide.attribute(batch.images, target.clamp(min=0))
    return [(maps[:, t], *judged(batch.boxes, target[:, t], batch.ignore)) for t in range(most)]


class _Metrics:
    def __init__(self, evaluation: Evaluator) -> None:
        # Here, not above: torchmetrics takes seconds to import, which a run's first step must not wait for.
        from debiaskd.metrics import (
            BoxIoU,
            EnergyPointingGame,
            GroupAccuracy,
            MultilabelF1,
            MultilabelMeanAveragePrecision,
        )

        loader = evaluation.loader
        split, device = loader.split, loader.device
        self.found: dict[str, Any] = {}
        self.multi_label = split.whole.multi_label
        self.each: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []
        self.right = torch.zeros(2, dtype=torch.float64, device=device)
        if self.multi_label:
            self.found["f1"] = MultilabelF1(split.num_classes).to(device)
            self.found["map"] = MultilabelMeanAveragePrecision(split.num_classes).to(device)
        if annotated(split) and not self.multi_label:
            groups = len(split.whole.groups)
            self.found["groups"] = GroupAccuracy(evaluation.training_groups, groups).to(device)
        if split.environments is not None and not self.multi_label:
            self.found["environments"] = GroupAccuracy(None, len(split.environment_names)).to(device)
            by_number = torch.zeros(len(split.whole), dtype=torch.int64)
            by_number[split.numbers] = split.environments
            self.environments = by_number.to(device)
        if evaluation.has_boxes:
            self.found["epg"] = EnergyPointingGame(bins=SIZES, size=loader.size).to(device)
            self.found["iou"] = BoxIoU(evaluation.threshold, size=loader.size).to(device)

    def classes(self, logits: Tensor, batch: Batch) -> None:
        if self.multi_label:
            self.found["f1"].update(logits.float(), batch.target.long())
            self.found["map"].update(logits.float(), batch.target.long())
            return
        correct = logits.argmax(1) == batch.target
        self.right += torch.stack([correct.double().sum(), correct.new_tensor(len(correct), dtype=torch.float64)])
        self.each.append((correct, logits.float().softmax(1).amax(1), batch.groups, batch.index))
        if "groups" in self.found:
            self.found["groups"].update(correct, batch.groups)
        if "environments" in self.found:
            assert batch.index is not None
            self.found["environments"].update(correct, self.environments[batch.index])

    def judged(self) -> Judged | None:
        """Of all batches together; None where there is none, or where they are not numbered."""
        if not self.each or any(index is None for *_, index in self.each):
            return None
        correct, confidence, groups, index = (list(column) for column in zip(*self.each))
        known = None if groups[0] is None else torch.cat(groups).cpu()
        return Judged(torch.cat(correct).cpu(), torch.cat(confidence).cpu(), known, torch.cat(index).cpu())

    def maps(self, maps: Tensor, boxes: Boxes, ignore: Boxes | None) -> None:
        self.found["epg"].update(maps, boxes, ignore)
        self.found["iou"].update(maps, boxes, ignore)

    def compute(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        if self.multi_label:
            figures["f1"] = float(self.found["f1"].compute())
            figures["map"] = float(self.found["map"].compute())
            figures["map_classes"] = self.found["map"].classes()
        else:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(self.right)
            figures["accuracy"] = float(self.right[0] / self.right[1])
        if "groups" in self.found:
            computed = self.found["groups"].compute()
            for name, key in (("worst_group", "worst_group_accuracy"), ("unbiased", "unbiased_accuracy")):
                figures[key] = float(computed[name]) / 100
            figures["adjusted_accuracy"] = float(computed["adjusted"]) / 100
            figures["smallest_group_pictures"] = int(computed["smallest"])
            figures |= {f"group_{g}_accuracy": float(v) / 100 for g, v in enumerate(computed["groups"])}
        if "environments" in self.found:
            computed = self.found["environments"].compute()
            figures["worst_environment_accuracy"] = float(computed["worst_group"]) / 100
            figures["smallest_environment_pictures"] = int(computed["smallest"])
            figures |= {f"environment_{g}_accuracy": float(v) / 100 for g, v in enumerate(computed["groups"])}
        if "epg" in self.found:
            computed = self.found["epg"].compute()
            figures |= {name: float(computed[name]) for name in ("epg", "epg_defined", "defined")}
            sizes = zip(("small", "middle", "large"), computed["epg_bins"])
            figures |= {f"epg_{name}": float(value) for name, value in sizes}
            computed = self.found["iou"].compute()
            figures |= {"iou": float(computed["iou"]), "iou_threshold": float(computed["threshold"])}
        return figures


#: (what is measured, its heading): in the order in which people read them.
HEADINGS: Sequence[tuple[str, str]] = (
    ("f1", "F1"),
    ("map", "mAP"),
    ("accuracy", "accuracy"),
    ("worst_group_accuracy", "worst group"),
    ("unbiased_accuracy", "unbiased"),
    ("adjusted_accuracy", "adjusted"),
    ("worst_group_low", "worst group, lower end"),
    ("worst_group_high", "worst group, upper end"),
    ("ece", "ECE"),
    ("worst_group_ece", "ECE, worst group"),
    ("worst_environment_accuracy", "worst found environment"),
    ("epg", "EPG"),
    ("epg_defined", "EPG where defined"),
    ("epg_small", "EPG, small boxes"),
    ("epg_middle", "EPG, middling boxes"),
    ("epg_large", "EPG, large boxes"),
    ("iou", "IoU"),
    ("deletion", "deletion"),
    ("deletion_random", "deletion at random"),
)
#: (what is counted, its heading): numbers of classes and of images that other metrics are of.
COUNTS: Sequence[tuple[str, str]] = (
    ("map_classes", "classes in the mAP"),
    ("smallest_group_pictures", "smallest group, images"),
    ("smallest_environment_pictures", "smallest found environment, images"),
)
