"""Metrics: accuracies over groups, and how much of an attribution lies on the object.

Functions of one batch: `group_accuracy`; `energy_in_box`, `energy_pointing_game`, `iou_with_boxes`, `box_coverage`,
`box_size_bins`; `worst_group_interval`, `paired_difference`, `calibration_error`, `group_calibration_error`,
`deletion`.

Metrics that accumulate over batches and ranks (torchmetrics, part of the `train` extra, imported on first use):
`EnergyPointingGame`, `BoxIoU`, `MultilabelF1`, `MultilabelMeanAveragePrecision`, `GroupAccuracy`.

Accuracies over groups are in percent, 0 to 100. Everything else is a fraction, 0 to 1, as in torchmetrics and
`debiaskd.training.pareto`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from debiaskd.metrics.calibration import calibration_error, group_calibration_error
from debiaskd.metrics.faithfulness import Deletion, deletion
from debiaskd.metrics.groups import GroupAccuracies, group_accuracy
from debiaskd.metrics.intervals import Interval, paired_difference, worst_group_interval
from debiaskd.metrics.localization import (
    box_coverage,
    box_size_bins,
    energy_in_box,
    energy_pointing_game,
    iou_with_boxes,
)

if TYPE_CHECKING:
    from debiaskd.metrics.accumulated import BoxIoU, EnergyPointingGame, GroupAccuracy
    from debiaskd.metrics.multilabel import MultilabelF1, MultilabelMeanAveragePrecision

__all__ = [
    "BoxIoU",
    "Deletion",
    "EnergyPointingGame",
    "GroupAccuracies",
    "GroupAccuracy",
    "Interval",
    "MultilabelF1",
    "MultilabelMeanAveragePrecision",
    "box_coverage",
    "box_size_bins",
    "calibration_error",
    "deletion",
    "energy_in_box",
    "energy_pointing_game",
    "group_accuracy",
    "group_calibration_error",
    "iou_with_boxes",
    "paired_difference",
    "worst_group_interval",
]

_ON_TORCHMETRICS = {
    "BoxIoU": "accumulated",
    "EnergyPointingGame": "accumulated",
    "GroupAccuracy": "accumulated",
    "MultilabelF1": "multilabel",
    "MultilabelMeanAveragePrecision": "multilabel",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_TORCHMETRICS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_ON_TORCHMETRICS[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torchmetrics":
            raise
        raise ModuleNotFoundError(
            f"{__name__}.{name} needs torchmetrics, which is not installed: pip install 'debiaskd[train]'",
            name="torchmetrics",
        ) from None
