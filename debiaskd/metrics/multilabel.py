"""Multi-label F1 and mean average precision of logits, over batches and ranks, as `torchmetrics.Metric`s."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score
from torchmetrics.functional.classification import binary_average_precision
from torchmetrics.utilities.data import dim_zero_cat

from debiaskd.metrics.merging import Mergeable
from debiaskd.utils import checks


class MultilabelF1(Mergeable, MultilabelF1Score):
    """Compute torchmetrics' `MultilabelF1Score` of logits; a label is predicted if `logit >= threshold`.

    torchmetrics treats logits as probabilities in any batch whose logits all lie in [0,1], compares with >, and returns
    0 where F1 is undefined: for a class that no sample has and that is never predicted.

    Args:
        num_labels: K >= 2.
        average: "micro" (over all decisions), "macro" (over the classes that have an F1), "weighted" (by their positive
            samples), or "none" for one F1 per class [K].
        threshold: threshold of the logits.

    `update(logits, targets)` takes floating [N,K], and [N,K] of 0 and 1 of any dtype. `compute()` gives fractions; NaN
    where 2 TP + FP + FN is 0, and for "weighted" without a positive sample.

    Example:
        >>> import torch
        >>> from debiaskd.metrics import MultilabelF1
        >>> metric = MultilabelF1(2)
        >>> metric.update(torch.tensor([[0.1, -2.0], [0.4, 0.2]]), torch.tensor([[1, 0], [0, 1]]))
        >>> metric.compute()
        tensor(0.8000)
    """

    def __init__(self, num_labels: int, average: str = "micro", threshold: float = 0.0, **kwargs: Any) -> None:
        checks.option("average", average, ("micro", "macro", "weighted", "none"))
        self.logit_threshold = checks.number("threshold", threshold)
        super().__init__(_labels(num_labels), average=average, **kwargs)  # type: ignore[arg-type]

    def update(self, logits: Tensor, targets: Tensor) -> None:
        targets = _targets(logits, targets, self.num_labels)
        if len(targets):  # torchmetrics cannot reshape an empty batch, which a rank may have
            super().update((logits >= self.logit_threshold).long(), targets)

    def settings(self) -> dict[str, Any]:
        return {"num_labels": self.num_labels, "average": self.average, "threshold": self.logit_threshold}

    def compute(self) -> Tensor:
        right, wrong, _, missed = (state.double() for state in self._final_state())
        if self.average == "micro":
            right, wrong, missed = right.sum(), wrong.sum(), missed.sum()
        found = 2 * right / (2 * right + wrong + missed)  # 0 / 0 where there is nothing to be judged
        if self.average == "macro":
            found = found.nanmean()
        elif self.average == "weighted":
            support = right + missed
            found = (found.nan_to_num() * support).sum() / support.sum()
        return found.float()


class MultilabelMeanAveragePrecision(Mergeable, MultilabelAveragePrecision):
    """Compute the exact mean over classes of the average precision of logits (mAP).

    A class without a positive sample has no average precision: it is excluded from the mean, and `classes()` returns
    the number of the others. torchmetrics' `MultilabelAveragePrecision` counts such a class as 0. It also applies the
    sigmoid only to batches with a logit outside [0,1], which mixes two scales, and in float32, where logits above 17
    are ties.

    Args:
        num_labels: K >= 2.
        average: "macro" (mAP, over classes with a positive sample), "micro" (over all decisions), "weighted" (by
            positive samples), or "none" for [K], NaN for a class without a positive sample.

    `update(logits, targets)` takes floating [N,K], and [N,K] of 0 and 1 of any dtype. `compute()` gives fractions, NaN
    without a positive sample. Every score is kept: 16 bytes per sample and class.

    Example:
        >>> import torch
        >>> from debiaskd.metrics import MultilabelMeanAveragePrecision
        >>> metric = MultilabelMeanAveragePrecision(2, average="none")
        >>> metric.update(torch.tensor([[0.1, 0.3], [0.9, 0.1]]), torch.tensor([[1, 1], [0, 0]]))
        >>> metric.update(torch.tensor([[3.0, -4.0], [-2.0, -5.0]]), torch.tensor([[1, 0], [0, 0]]))
        >>> metric.compute()
        tensor([0.8333, 1.0000])
    """

    preds: list[Tensor]
    target: list[Tensor]
    positives: Tensor

    def __init__(self, num_labels: int, average: str = "macro", **kwargs: Any) -> None:
        checks.option("average", average, ("macro", "micro", "weighted", "none"))
        super().__init__(_labels(num_labels), average=average, **kwargs)  # type: ignore[arg-type]
        self.add_state("positives", torch.zeros(num_labels, dtype=torch.int64), dist_reduce_fx="sum")

    def settings(self) -> dict[str, Any]:
        return {"num_labels": self.num_labels, "average": self.average}

    def update(self, logits: Tensor, targets: Tensor) -> None:
        targets = _targets(logits, targets, self.num_labels)
        self.positives = self.positives + targets.sum(0)
        if len(targets):
            super().update(logits.detach().double().sigmoid(), targets)

    def compute(self) -> Tensor:  # type: ignore[override]
        shown = self.positives > 0
        found = torch.full((self.num_labels,), torch.nan, device=shown.device)
        if not bool(shown.any()):
            return found if self.average == "none" else found[0]
        scores, target = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        if self.average == "micro":
            return binary_average_precision(scores.flatten(), target.flatten(), validate_args=False)
        for k in shown.nonzero()[:, 0].tolist():
            found[k] = binary_average_precision(scores[:, k], target[:, k], validate_args=False)
        if self.average == "macro":
            return found[shown].mean()
        if self.average == "weighted":
            return (found[shown] * self.positives[shown]).sum() / self.positives.sum()
        return found

    def classes(self) -> int:
        """Return the number of classes with a positive sample, over all updates on all ranks."""
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            return int((self.positives > 0).sum())

    def sync(self, *args: Any, **kwargs: Any) -> None:
        # A rank without samples would send a tensor of another dtype and shape, which breaks gathering.
        if not self.preds and torch.distributed.is_available() and torch.distributed.is_initialized():
            self.preds.append(torch.zeros(0, self.num_labels, dtype=torch.float64, device=self.device))
            self.target.append(torch.zeros(0, self.num_labels, dtype=torch.int64, device=self.device))
        super().sync(*args, **kwargs)


def _labels(num_labels: int) -> int:
    if checks.integer("num_labels", num_labels) < 2:
        raise ValueError(f"num_labels must be an integer >= 2, got {num_labels}")
    return num_labels


def _targets(logits: Tensor, targets: Tensor, num_labels: int) -> Tensor:
    checks.rank("logits", checks.floating("logits", logits), "[N,K]")
    checks.shape("logits", logits, "[N,K]", [len(logits), num_labels])
    checks.shape("targets", checks.tensor("targets", targets), "[N,K]", list(logits.shape))
    if logits.device.type == "cpu":  # elsewhere, reading values would synchronise with the device
        if bool(logits.isnan().any()):
            raise ValueError("logits must not hold NaN, got NaN")
        if not bool(((targets == 0) | (targets == 1)).all()):
            raise ValueError(f"targets must hold 0 and 1 alone, got {targets.unique()[:5].tolist()}")
    return targets.long()
