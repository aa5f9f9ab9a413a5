"""Metrics that accumulate over batches and ranks, as `torchmetrics.Metric`s.

States are sums, added over ranks. Sums of float32 values in float64 rarely round, so that one and several processes
agree. Multi-label metrics are in `debiaskd.metrics.multilabel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from debiaskd.boxes import Boxes
from debiaskd.metrics.groups import accuracies, check_correct, check_groups
from debiaskd.metrics.localization import box_size_bins, check_edges, energy_pointing_game, iou_with_boxes
from debiaskd.metrics.merging import Mergeable
from debiaskd.ops.box_overlap import check_thresholds
from debiaskd.utils import checks

#: Default thresholds of `BoxIoU`: 0.05, 0.10, …, 0.95.
GRID = tuple(step / 20 for step in range(1, 20))


class EnergyPointingGame(Mergeable):
    """Compute the mean energy pointing game over all maps of annotated images.

    Args:
        bins: K increasing edges for `box_size_bins`; None: no bins.
        size: (height, width) that the boxes refer to; None: each map's own.

    `update(attribution, boxes, ignore=None)` takes [N,H,W], the boxes of N images, and the areas to be left out of them
    (`Batch.ignore`). `compute()` gives a dict:

        epg           fraction in [0,1], maps without a positive value counted as 0; NaN without any map
        epg_defined   the same, over the maps that have a positive value
        defined       the fraction of maps that have one
        images        how many maps
        epg_bins, epg_defined_bins, images_bins    [K+1] the same for each bin, with `bins`

    A map that holds NaN makes the means NaN.

    Example:
        >>> import torch
        >>> from debiaskd import Boxes
        >>> from debiaskd.metrics import EnergyPointingGame
        >>> metric = EnergyPointingGame()
        >>> metric.update(torch.tensor([[[3.0, 1.0]], [[-1.0, 0.0]]]), Boxes.from_lists([[[0, 0, 1, 1]]] * 2))
        >>> found = metric.compute()
        >>> found["epg"].item(), found["epg_defined"].item(), found["defined"].item()
        (0.375, 0.75, 0.5)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    shares: Tensor
    images: Tensor
    defined: Tensor

    def __init__(self, bins: Sequence[float] | None = None, size: tuple[int, int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.edges = None if bins is None else check_edges("bins", bins)
        self.size = None if size is None else checks.size("size", size)
        # One entry for each bin, and one for images outside all bins.
        places = 1 if self.edges is None else len(self.edges) + 2
        self.add_state("shares", torch.zeros(places, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(places, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("defined", torch.zeros(places, dtype=torch.int64), dist_reduce_fx="sum")

    def settings(self) -> dict[str, Any]:
        return {"bins": self.edges, "size": self.size}

    def update(self, attribution: Tensor, boxes: Boxes, ignore: Boxes | None = None) -> None:
        share, defined = energy_pointing_game(attribution, boxes, self.size, ignore)
        if self.edges is None:
            places = torch.zeros(len(boxes), dtype=torch.int64, device=share.device)
        else:
            places = box_size_bins(boxes, self.size or (attribution.shape[1], attribution.shape[2]), self.edges)
        # Summed by comparison: index_add is not reproducible on a GPU.
        chosen = places.remainder(len(self.shares)) == torch.arange(len(self.shares), device=share.device)[:, None]
        self.shares += torch.where(chosen & boxes.annotated, share.double(), 0).sum(1)
        self.images += (chosen & boxes.annotated).sum(1)
        self.defined += (chosen & defined).sum(1)

    def compute(self) -> dict[str, Tensor]:
        shares, images, defined = self.shares.sum(), self.images.sum(), self.defined.sum()
        found = {
            "epg": shares / images,
            "epg_defined": shares / defined,
            "defined": defined / images,
            "images": images,
        }
        if self.edges is not None:
            shares, images, defined = self.shares[:-1], self.images[:-1], self.defined[:-1]
            found |= {"epg_bins": shares / images, "epg_defined_bins": shares / defined, "images_bins": images}
        return found


class BoxIoU(Mergeable):
    """Compute the mean IoU with the boxes over all maps of annotated images, at a fixed or a selected threshold.

    On validation data, select the threshold with `best_threshold()`; on test data, pass it as `threshold`. A threshold
    that is selected on the test set makes the IoU too optimistic.

    Args:
        threshold: in [0,1); None: the one of `grid` with the highest mean, the lowest such in a tie.
        grid: candidate thresholds, in [0,1).
        size: (height, width) that the boxes refer to; None: each map's own.

    `update(attribution, boxes, ignore=None)` takes [N,H,W], the boxes of N images, and the areas to be left out of them
    (`Batch.ignore`). `compute()` gives a dict: `iou` (fraction in [0,1], NaN without any map), `threshold` (NaN
    where there was no map to choose it by), and, where it was to be chosen, `iou_grid` [T].

    Example:
        >>> import torch
        >>> from debiaskd import Boxes
        >>> from debiaskd.metrics import BoxIoU
        >>> metric = BoxIoU(grid=(0.2, 0.5, 0.8))
        >>> metric.update(torch.tensor([[[1.0, 0.6], [0.3, 0.0]]]), Boxes.from_lists([[[0, 0, 2, 1]]]))
        >>> metric.best_threshold(), metric.compute()["iou"].item()
        (0.5, 1.0)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    ious: Tensor
    images: Tensor

    def __init__(
        self,
        threshold: float | None = None,
        grid: Sequence[float] = GRID,
        size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.chosen = threshold is None
        self.grid = check_thresholds("grid", grid) if threshold is None else check_thresholds("threshold", [threshold])
        self.size = None if size is None else checks.size("size", size)
        self.add_state("ious", torch.zeros(len(self.grid), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def settings(self) -> dict[str, Any]:
        return {"threshold": None if self.chosen else self.grid[0], "grid": self.grid, "size": self.size}

    def update(self, attribution: Tensor, boxes: Boxes, ignore: Boxes | None = None) -> None:
        found = iou_with_boxes(attribution, boxes, self.grid, self.size, ignore)
        self.ious += torch.where(boxes.annotated[:, None], found.double(), 0).sum(0)
        self.images += boxes.annotated.sum()

    def compute(self) -> dict[str, Tensor]:
        means = self.ious / self.images
        best = means.argmax()
        thresholds = torch.tensor(self.grid, dtype=torch.float64, device=means.device)
        # Without any map no threshold is the best.
        threshold = torch.where(means[best].isnan() & self.chosen, torch.nan, thresholds[best])
        found = {"iou": means[best], "threshold": threshold}
        return found | {"iou_grid": means} if self.chosen else found

    def best_threshold(self) -> float:
        """Return the best threshold over all updates on all ranks.

        Raises:
            ValueError: no map was added, or one that contains NaN.
        """
        found = self.compute()
        if not bool(found["iou"].isfinite()):
            raise ValueError(f"best_threshold() needs maps without NaN, got {int(self.images)} maps of mean IoU nan")
        return float(found["threshold"])


class GroupAccuracy(Mergeable):
    """Compute `group_accuracy` over many batches.

    Args:
        training_groups: int64 [M], the groups of the training set; None: not known, `adjusted` is NaN.
        num_groups: G, if there are groups without training samples; None: the largest training group + 1.

    `update(correct, groups)` takes bool [N] and int64 [N] in [0,G). `compute()` gives a dict, in percent: `average`,
    `worst_group`, `unbiased`, `adjusted` (NaN where no group is in training, too), and `groups` [G], NaN for a group
    without a sample; and `smallest`, int64, the number of samples of the smallest group that has any.

    Example:
        >>> import torch
        >>> from debiaskd.metrics import GroupAccuracy
        >>> metric = GroupAccuracy(torch.tensor([0, 0, 0, 1]))
        >>> metric.update(torch.tensor([True, True, True, False]), torch.tensor([0, 0, 1, 1]))
        >>> found = metric.compute()
        >>> found["worst_group"].item(), found["adjusted"].item(), found["smallest"].item()
        (50.0, 87.5, 2)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    right: Tensor
    count: Tensor
    training_count: Tensor

    def __init__(self, training_groups: Tensor | None, num_groups: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if training_groups is None:
            if num_groups is None:
                raise ValueError("num_groups must be given where training_groups is None, got None")
            training_groups, least = torch.zeros(0, dtype=torch.int64), 1
        else:
            check_groups("training_groups", training_groups)
            least = int(training_groups.max()) + 1
        self.num_groups = least if num_groups is None else checks.integer("num_groups", num_groups)
        if self.num_groups < least:
            raise ValueError(f"num_groups must be at least {least}, as training_groups has, got {num_groups}")
        self.register_buffer("training_count", training_groups.bincount(minlength=self.num_groups), persistent=False)
        self.add_state("right", torch.zeros(self.num_groups, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(self.num_groups, dtype=torch.int64), dist_reduce_fx="sum")

    def settings(self) -> dict[str, Any]:
        return {"num_groups": self.num_groups, "training_groups": self.training_count.tolist()}

    def update(self, correct: Tensor, groups: Tensor) -> None:
        check_correct(correct)
        if not len(correct) and not checks.tensor("groups", groups).numel():
            return  # a rank may have no sample of a batch
        check_groups("groups", groups)
        checks.shape("groups", groups, "[N]", [len(correct)])
        if int(groups.max()) >= self.num_groups:
            raise ValueError(f"groups must hold ids < {self.num_groups} (num_groups), got {int(groups.max())}")
        self.right += groups[correct].bincount(minlength=self.num_groups)
        self.count += groups.bincount(minlength=self.num_groups)

    def compute(self) -> dict[str, Tensor]:
        if not bool(self.count.any()):
            raise ValueError("GroupAccuracy needs at least one sample, got none")
        found = accuracies(self.right, self.count, self.training_count)
        return {
            name: torch.tensor(getattr(found, name), dtype=torch.float64, device=self.count.device)
            for name in ("average", "worst_group", "unbiased", "adjusted", "groups")
        } | {"smallest": torch.tensor(found.smallest, device=self.count.device)}
