"""The outputs of a frozen teacher that the terms ask for: computed for every batch, or cached in a stage."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from debiaskd.attribution.explainer import has_bcos_layers
from debiaskd.models.depths import DEPTHS
from debiaskd.models.frozen_teacher import FrozenTeacher
from debiaskd.pipeline.context import StageContext
from debiaskd.recipe import RecipeError, Teacher
from debiaskd.terms import ExplainOptions, make_explainer
from debiaskd.training.teacher_cache import CachedTeacher, write_cache
from debiaskd.training.teacher_outputs import FrozenExtractor, LiveTeacher, TeacherOutputs, WholeTeacher


def teacher_outputs(
    pipeline: StageContext,
    teacher: FrozenTeacher | FrozenExtractor,
    options: Teacher,
    fingerprint: str,
    parts: tuple[str, ...],
) -> TeacherOutputs:
    """The teacher as training asks it: running, or with its outputs for all training images written to a cache."""
    if pipeline.recipe.compute.compile:
        teacher.body.compile()
    live = live_teacher(pipeline, teacher, options).to(pipeline.fabric.device)
    if options.cache is None:
        return live
    trainer, views = pipeline.trainer, options.views or 1
    seed = zlib.crc32(f"{pipeline.recipe.seed}/student/steps".encode())
    inputs = {**pipeline.base, "pictures": pipeline.common()["pictures"], "teacher": fingerprint, "seed": seed}
    inputs |= {"parts": parts, "dtype": options.cache, "views": views}
    # Of both networks: the student's size, too, decides how large the crop is that the teacher's input is made of.
    inputs |= trainer.contracts.decisive(pipeline.recipe.student, options)
    older = dict(inputs)
    inputs |= {key: value for key, value in pipeline.common().items() if key == "compute"}
    inputs["network"] = [options.bias_free, options.layer, options.head, options.options]
    inputs["transplant"] = pipeline.recipe.transplant is not None
    if "explanation" in parts:
        inputs["explain"] = _explanation(pipeline.recipe.terms.explain)

    def make(folder: Path, fingerprint: str) -> dict[str, Any]:
        loader = trainer.loader(
            trainer.train, pipeline.recipe.student, training=True, batch=64, teacher_outputs=live, alone=True
        )
        share = (trainer.ranks.rank, trainer.ranks.world_size)
        with pipeline.fabric.autocast():
            for done in write_cache(
                folder, live, loader, seed=seed, views=views, dtype=str(options.cache), parts=parts, share=share
            ):
                trainer.progress("teacher-cache", done, "")
        pipeline.fabric.barrier()
        return {"pictures": len(trainer.train), "views": views, "parts": parts, "dtype": options.cache}

    stage = pipeline.run.stage("teacher-cache", inputs, make, older=older)
    place = torch.full((len(trainer.train.whole),), -1)
    place[trainer.train.numbers] = torch.arange(len(trainer.train))
    return CachedTeacher(stage.folder, place, views, live.width)


def live_teacher(pipeline: StageContext, teacher: FrozenTeacher | FrozenExtractor, options: Teacher) -> LiveTeacher:
    """The teacher that computes its outputs, with its attribution maps where the term `explain` compares them.

    Raises:
        RecipeError: the teacher has no such layer, or maps of another kind than the student's.
    """
    explain = pipeline.recipe.terms.explain
    if explain is None:
        return LiveTeacher(teacher)
    student_is_bcos, teacher_is_bcos = has_bcos_layers(pipeline.student_network), has_bcos_layers(teacher)
    if explain.attribution is None and student_is_bcos != teacher_is_bcos:
        one, other = ("student", "teacher") if student_is_bcos else ("teacher", "student")
        raise RecipeError(
            f"terms.explain.attribution: must be named, because the {one} is a B-cos network and the {other} is not"
        )
    whole = WholeTeacher(teacher)
    if explain.teacher_layer not in (None, *DEPTHS):
        explain = replace(explain, teacher_layer=whole.submodule(str(explain.teacher_layer)))
    try:
        explainer = make_explainer(explain, whole, "teacher")
        explainer.explain(pipeline.trainer.example(options))  # decided now, and the same in a run that is resumed
    except (TypeError, ValueError) as error:
        shown = str(error).replace(whole.submodule(""), "").replace(type(whole).__name__, options.name)
        raise RecipeError(f"terms.explain: teacher: {shown}") from None
    return LiveTeacher(teacher, explainer, labels=explain.target == "label")


def _explanation(options: ExplainOptions | None) -> list[str | None]:
    """What the teacher's maps depend on."""
    assert options is not None
    return [options.layer, options.teacher_layer, options.attribution, options.target]
