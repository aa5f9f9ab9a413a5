"""Fit the initial weights of a transplanted student's linear projector, as a stage of its own."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from debiaskd.models.projector_fit import fit_projector
from debiaskd.models.transplant import Transplanted
from debiaskd.pipeline.context import StageContext
from debiaskd.training.run import Stage, decisive
from debiaskd.training.teacher_cache import ViewDraws
from debiaskd.training.teacher_outputs import TeacherOutputs
from debiaskd.utils import files

#: Images of a forward pass.
_BATCH = 64


def fitted_projector(
    context: StageContext,
    model: Transplanted,
    teacher: TeacherOutputs,
    before: dict[str, Any],
    weight: Tensor | None,
) -> Stage:
    """The stage; `model` has its projector afterwards.

    Args:
        context: of the recipe.
        model: with the weights that the student's training starts from.
        teacher: its outputs for augmented training images; the first view of each is used.
        before: fingerprint inputs of all stages before.
        weight: sample weights [N] of the prepared split, by image number; None: all alike.
    """
    from safetensors.torch import load_file, save_file

    recipe, trainer = context.recipe, context.trainer
    assert recipe.teacher is not None and recipe.terms.match is not None
    weight = weight if recipe.terms.match.weighted else None
    document, common = decisive(context.run.document), context.common()
    inputs = {**before, **trainer.contracts.decisive(recipe.student, recipe.teacher)}
    inputs |= {key: common[key] for key in ("pictures", "seed", "compute") if key in common}
    inputs |= {key: document[key] for key in ("student", "transplant")}
    inputs |= {"cache": [recipe.teacher.cache, recipe.teacher.views], "match": document["terms"]["match"]}
    name = "projector.safetensors"

    def make(folder: Path, fingerprint: str) -> dict[str, Any]:
        device = context.fabric.device
        model.to(device)
        with context.fabric.autocast():
            batches = _batches(context, teacher.to(device), weight)
            explained = fit_projector(model, batches, total=trainer.ranks.sum)
        state = {key: value.cpu() for key, value in model.projector.state_dict().items()}
        if trainer.ranks.rank == 0:
            files.write(folder / name, lambda path: save_file(state, path))
        context.fabric.barrier()
        return {"pictures": len(trainer.train), "explained": explained}

    stage = context.run.stage("projector", inputs, make)
    model.projector.load_state_dict(load_file(stage.folder / name))
    return stage


def _batches(
    context: StageContext, teacher: TeacherOutputs, weight: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """This process's images as the student reads them, the teacher's maps of them, and their weights."""
    recipe, trainer = context.recipe, context.trainer
    loader = trainer.loader(
        trainer.train, recipe.student, training=True, batch=_BATCH, teacher_outputs=teacher, alone=True
    )
    seed = zlib.crc32(f"{recipe.seed}/student/steps".encode())
    parts = trainer.train.numbers[trainer.ranks.rank :: trainer.ranks.world_size].split(_BATCH)
    for done, numbers in enumerate(parts):
        batch = loader.split.whole.__getitems__(numbers)
        placed = loader.transform(batch, ViewDraws(seed, numbers, 0, loader.device))
        feature = teacher(placed, 0, numbers).feature
        assert feature is not None
        yield placed.images, feature, None if weight is None else weight[numbers]
        trainer.progress("projector", (done + 1) / len(parts), "")
