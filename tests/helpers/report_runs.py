"""Runs to be compared, for tests of `debiaskd report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import training_runs as runs

from debiaskd.data import prepare

ERM: dict[str, Any] = {
    "student": {"name": "plain/4"},
    "schedule": {"epochs": 2, "batch": 12, "learning_rate": 1e-2},
    "terms": {"supervised": {}},
    "selection": {"attributions": True},
    "compute": {"accelerator": "cpu", "log_every": 2},
}
GUIDED = {
    **ERM,
    "terms": {"supervised": {}, "guide": {"weight": 0.2}},
    "selection": {"rule": "pareto", "attributions": True},
}
RECIPES: dict[str, dict[str, Any]] = {"erm-0": ERM, "erm-1": {**ERM, "seed": 1}, "guided": GUIDED, "small": ERM}


def make(root: Path, names: Sequence[str]) -> Path:
    """Those of `RECIPES`, each in a folder of its name, on birds16; small on birds8."""
    runs.birds(root)
    prepare("waterbirds", root / "birds", root / "birds8", size=8, workers=1)
    for name in names:
        where = root / ("birds8" if name == "small" else "birds16")
        runs.train(runs.write(root / f"{name}.yaml", where, RECIPES[name]), root / name)
    return root
