"""Train an identification model: briefly, on the labels alone; its mistakes are upweighted (JTT, DeTT)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from debiaskd.models.registry import load_weights
from debiaskd.pipeline.context import StageContext
from debiaskd.recipe import Network, Schedule, Teacher
from debiaskd.terms import SupervisedOptions
from debiaskd.training.feature_extraction import iterate_outputs


def train_identification(
    context: StageContext, name: str, network: Network, schedule: Schedule
) -> tuple[Callable[[], Tensor], str]:
    """Train the identification model, unless the stage is finished.

    Args:
        context: of the recipe.
        name: of the stage.
        network: of the recipe, the student or the teacher.
        schedule: of the training.

    Returns:
        (a function that gives bool [N], whether the model predicts each training image correctly; the fingerprint
        of the stage).
    """
    trainer, run = context.trainer, context.run
    teacher = isinstance(network, Teacher)
    section = run.document["teacher" if teacher else "student"]
    words = (section if teacher else run.document)["schedule"]
    plain = {field.name: section[field.name] for field in dataclasses.fields(Network) if field.name in section}
    inputs = {**context.base, **context.common(), **trainer.contracts.decisive(network)}
    inputs |= {"network": plain, "schedule": {key: value for key, value in vars(schedule).items() if key in words}}

    def make(folder: Path, fingerprint: str) -> dict[str, Any]:
        model = trainer.network(network, name)
        return trainer.fit(name, folder, fingerprint, model, {"supervised": SupervisedOptions()}, schedule, rule="last")

    stage = run.stage(name, inputs, make)

    def correct() -> Tensor:
        model = trainer.network(network, name).to(context.fabric.device).eval()
        load_weights(model, stage.model)
        loader = trainer.loader(trainer.train, network, training=False, batch=256, alone=True)
        outputs = iterate_outputs(model, None, loader, context.fabric.autocast)
        return torch.cat([each.logits.argmax(1).cpu() for each in outputs]) == trainer.train.target

    return correct, stage.fingerprint
