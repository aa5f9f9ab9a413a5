"""Fit a linear probe on a frozen student's features for another data set.

The student's pooled features, as its last layer reads them, standardised; logistic regression on them, its strength of
regularisation chosen on a fifth of the probe's training images; measured on the probe's test images. Nothing of the
student is trained. CID claims that its students' features transfer better (Deng & Zhang 2021).
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from debiaskd.evaluation.evaluate import LoadedStage
from debiaskd.recipe import Data, RecipeError
from debiaskd.training.batches import Split, open_split
from debiaskd.training.feature_extraction import find_feature_layers, read_outputs
from debiaskd.utils import files

#: Inverse strengths of L2 regularisation that are tried.
STRENGTHS = (0.001, 0.01, 0.1, 1.0)


def probe_run(folder: Path, stage: str, data: str, splits: tuple[str, str]) -> tuple[dict[str, Any], Path]:
    """Fit and evaluate a probe; return (metrics with their provenance, the file that was written).

    Args:
        folder, stage: whose features.
        data: prepared images of another task.
        splits: of them, to fit on and to measure on.

    Raises:
        RunError, RecipeError, DataError, NetworkError: as their names say.
    """
    loaded = LoadedStage(folder, stage)
    asked = Data(data, train=splits[0], test=splits[1])
    train, test = open_split(asked, "train"), open_split(asked, "test")
    whole = train.whole
    if whole.split == test.whole.split and set(train.numbers.tolist()) & set(test.numbers.tolist()):
        raise RecipeError(f"--probe-splits: {splits[0]} and {splits[1]} must not share images")
    fitted, measured = _features(loaded, train), _features(loaded, test)
    mean, deviation = fitted.mean(0), fitted.std(0) + 1e-6
    fitted, measured = (fitted - mean) / deviation, (measured - mean) / deviation
    judge = _multi_label if whole.multi_label else _single_label
    figures, strength = judge(fitted, train.target.numpy(), measured, test.target.numpy())
    document = {
        "run": str(folder),
        "stage": stage,
        "probe": data,
        "splits": list(splits),
        "pictures": [len(train), len(test)],
        "features": fitted.shape[1],
        "strength": strength,
        "figures": {name: value if value == value else None for name, value in figures.items()},
    }
    suffix = "" if stage == "student" else f"-{stage}"
    path = folder / f"probe-{Path(data).name}{suffix}.json"
    files.write_json(path, document)
    return document, path


def _features(loaded: LoadedStage, split: Split) -> NDArray[np.float64]:
    example = loaded.contract.example().to(loaded.device)
    options = loaded.network
    at = find_feature_layers(loaded.model, example, options.layer, options.named_head, ("pooled",))
    return read_outputs(loaded.model, at, loaded.loader(split)).pooled.double().numpy()


def _single_label(
    fitted: NDArray[Any], target: NDArray[Any], measured: NDArray[Any], expected: NDArray[Any]
) -> tuple[dict[str, float], float]:
    held, rest = _hold_out(len(fitted))

    def right(strength: float) -> float:
        return float((_solver(strength, fitted[rest], target[rest]).predict(fitted[held]) == target[held]).mean())

    strength = max(STRENGTHS, key=right)
    predicted = _solver(strength, fitted, target).predict(measured)
    return {"accuracy": float((predicted == expected).mean())}, strength


def _multi_label(
    fitted: NDArray[Any], target: NDArray[Any], measured: NDArray[Any], expected: NDArray[Any]
) -> tuple[dict[str, float], float]:
    held, rest = _hold_out(len(fitted))

    def worth(strength: float) -> float:
        found = _f1(_scores(strength, fitted[rest], target[rest], fitted[held]), target[held])
        return found if found == found else 1.0  # no positives, and none predicted

    strength = max(STRENGTHS, key=worth)
    scores = _scores(strength, fitted, target, measured)
    found = {"f1": _f1(scores, expected), "map": _map(scores, expected)}
    return {**found, "map_classes": int(expected.any(0).sum())}, strength


def _hold_out(count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).numpy()
    return order[: count // 5], order[count // 5 :]


def _solver(strength: float, feature: NDArray[Any], target: NDArray[Any]) -> Any:
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(target)) < 2:
        raise RecipeError("--probe: the images to fit on must be of two classes at least")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits that end early
        return LogisticRegression(C=strength, max_iter=1000).fit(feature, target)


def _scores(strength: float, feature: NDArray[Any], target: NDArray[Any], measured: NDArray[Any]) -> NDArray[Any]:
    """[N,K] logits; -inf for a class that no image to fit on shows, inf for one that all do."""
    columns = []
    for column in target.T:
        if len(np.unique(column)) < 2:
            columns.append(np.full(len(measured), np.inf if column.all() else -np.inf))
        else:
            columns.append(_solver(strength, feature, column).decision_function(measured))
    return np.stack(columns, 1)


def _f1(scores: NDArray[Any], target: NDArray[Any]) -> float:
    predicted = scores >= 0
    right, judged = float((predicted & (target > 0)).sum()), float(predicted.sum() + target.sum())
    return 2 * right / judged if judged else math.nan


def _map(scores: NDArray[Any], target: NDArray[Any]) -> float:
    """Mean average precision over the classes that occur."""
    from sklearn.metrics import average_precision_score

    shown = [k for k in range(target.shape[1]) if target[:, k].any()]
    finite = np.clip(scores, -1e30, 1e30)
    return float(np.mean([average_precision_score(target[:, k], finite[:, k]) for k in shown])) if shown else math.nan
