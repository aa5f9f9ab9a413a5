"""Compute the sample weights of a recipe: by groups, or by the mistakes of an identification model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from debiaskd.pipeline.context import StageContext
from debiaskd.pipeline.identification import train_identification
from debiaskd.reweight import error_weights, group_weights
from debiaskd.training.run import Stage
from debiaskd.training.schedule import brief_schedule
from debiaskd.utils import files


def sample_weights(context: StageContext) -> Stage:
    """The stage of the recipe's `weights`, whose file `read_weights` reads."""
    options = context.recipe.weights
    assert options is not None
    if options.method == "groups":
        groups = context.trainer.train.groups
        assert groups is not None
        older = {**context.base, "method": "groups"}
        inputs = {**older, "pictures": context.common()["pictures"]}
        return _stage(context, inputs, lambda: group_weights(groups), older=older)
    schedule = brief_schedule(context.recipe.schedule, options.epochs)
    correct, fingerprint = train_identification(context, "identification", context.recipe.student, schedule)
    up, convention = 50.0 if options.up is None else options.up, options.convention or "weight"
    inputs = {"identification": fingerprint, "up": up, "convention": convention}
    return _stage(context, inputs, lambda: error_weights(correct(), up, convention=convention))


def read_weights(stage: Stage) -> Tensor:
    """float32 [N], by training image."""
    from safetensors.torch import load_file

    return load_file(stage.folder / "weights.safetensors")["weights"]


def _stage(
    context: StageContext,
    inputs: dict[str, Any],
    weights: Callable[[], Tensor],
    *,
    older: dict[str, Any] | None = None,
) -> Stage:
    from safetensors.torch import save_file

    def make(folder: Path, fingerprint: str) -> dict[str, Any]:
        found = weights()
        if context.trainer.ranks.rank == 0:
            files.write(folder / "weights.safetensors", lambda path: save_file({"weights": found}, path))
        context.fabric.barrier()
        heaviest = float(found.max())
        return {"pictures": len(found), "heaviest": heaviest, "heaviest_pictures": int((found == heaviest).sum())}

    return context.run.stage("weights", inputs, make, older=older)
