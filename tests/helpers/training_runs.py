"""Small data and recipes for tests of training, and a script that trains: it may kill itself, and run on several ranks.

python training_runs.py RECIPE.yaml RUN [--kill-at STEP | --kill-writing NUMBER]
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import data_trees as trees
import torch
import yaml
from torch import nn

from debiaskd.data import prepare
from debiaskd.models import registry as networks
from debiaskd.pipeline.stages import Pipeline
from debiaskd.recipe import read
from debiaskd.training.fabric import launch
from debiaskd.training.loop import TrainingLoop
from debiaskd.utils import files


class Plain(nn.Module):
    """Without batch norm, so that an image's result does not depend on who is in its batch."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, width, 3, 2, 1), nn.ReLU(), nn.Dropout2d(0.0)
        )
        self.fc = nn.Linear(width, classes)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)

    def forward_head(self, feature: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = feature.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


networks._FAMILIES["plain"] = lambda width, classes, pretrained: Plain(classes, int(width))


def birds(root: Path, size: int = 16) -> Path:
    """48 training, 16 validation and 16 test images of two classes and four groups, with boxes."""
    rows = [(i % 2, 0 if i < 48 else 1 if i < 64 else 2, (i // 2) % 2 if i % 4 < 2 else i % 2) for i in range(80)]
    trees.waterbirds(root / "birds", rows)
    prepare("waterbirds", root / "birds", root / f"birds{size}", size=size, workers=1)
    return root / f"birds{size}"


#: The labels alone.
PLAIN: dict[str, Any] = {
    "student": {"name": "plain/4"},
    "schedule": {"epochs": 2, "batch": 12, "learning_rate": 1e-2},
    "terms": {"supervised": {}},
    "compute": {"accelerator": "cpu"},
}

#: One epoch.
FAST: dict[str, Any] = {"epochs": 1, "batch": 12, "learning_rate": 1e-2}


def taught(schedule: dict[str, Any] = FAST, terms: dict[str, Any] | None = None, **teacher: Any) -> dict[str, Any]:
    """`PLAIN` with a teacher that is trained here, by "erm" and for `kd` alone unless the arguments say otherwise."""
    made = {"name": "plain/6", "method": "erm", "schedule": schedule, **teacher}
    return {**PLAIN, "schedule": schedule, "teacher": made, "terms": terms or {"kd": {}}}


#: Everything at once: every term, every stage, EMA, clipping, a schedule, checkpoints within epochs.
EVERYTHING: dict[str, Any] = {
    "data": {"annotated_fraction": 0.5, "crop_scale": [0.5, 1]},
    "teacher": {
        "name": "plain/8",
        "method": "group_dro",
        "schedule": {"epochs": 1, "batch": 12, "learning_rate": 1e-3},
    },
    "student": {"name": "plain/6"},
    "transplant": {"projector": "linear"},
    "weights": {"method": "errors", "up": 20, "epochs": 1},
    "schedule": {
        "epochs": 4,
        "batch": 12,
        "learning_rate": 1e-3,
        "ema": 0.9,
        "clip": 5.0,
        "shape": "cosine",
        "warmup": 1,
    },
    "terms": {
        "match": {},
        "kd": {"weight": 0.5, "weighted": True},
        "sample": {"weight": 0.1, "weighted": True},
        "relation": {"weight": 0.1, "start": 1},
        "backdoor": {"start": 2, "weight": 0.5, "mode": "exact", "mix": 0.3, "weighted": True},
        "guide": {"weight": 0.1},
    },
    "selection": {"rule": "pareto"},
    "compute": {"log_every": 3, "checkpoint_every": 3, "accelerator": "cpu"},
}


def write(path: Path, data: Path, document: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({**document, "data": {**document.get("data", {}), "path": str(data)}}))
    return path


def train(recipe: Path, out: Path, *overrides: str) -> Any:
    read_recipe = read(recipe, overrides)
    return Pipeline(read_recipe, out, launch(read_recipe.compute), lambda *news: None).student()


def kill_at(step: int) -> None:
    """The student's training dies before its step `step`."""
    inner = TrainingLoop._step

    def dying(self: TrainingLoop, *arguments: Any) -> None:
        if self.plan.folder.name == "student" and self.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        inner(self, *arguments)

    TrainingLoop._step = dying  # type: ignore[method-assign]


def kill_writing(number: int) -> None:
    """It dies in the middle of writing its checkpoint of this number, from 0."""
    inner, seen = files.write, []

    def dying(path: Path, fill: Any) -> None:
        if path.suffix == ".pt" and path.parent.parent.name == "student":
            seen.append(path)
            if len(seen) > number:

                def half(unfinished: Path) -> None:
                    fill(unfinished)
                    content = unfinished.read_bytes()
                    unfinished.write_bytes(content[: len(content) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)

                return inner(path, half)
        return inner(path, fill)

    files.write = dying


if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe_file, run, *rest = sys.argv[1:]
    if rest:
        {"--kill-at": kill_at, "--kill-writing": kill_writing}[rest[0]](int(rest[1]))
    train(Path(recipe_file), Path(run))
