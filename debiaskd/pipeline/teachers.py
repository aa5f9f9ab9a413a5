"""Debiased teachers that are trained here: erm, balanced, group_dro, jtt, dfr, and those of `debiaskd.pipeline.refits`.

`dfr` is debiased in its last layer alone, its features stay what the labels made of them: the layer is refitted on
validation images, with as many of each group (`debiaskd.pipeline.dfr`). What fitted it says too much good of students
that follow it, so that those images do not select the student's epoch unless the recipe says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.models.registry import load_weights, save_weights
from debiaskd.pipeline.context import StageContext
from debiaskd.pipeline.dfr import DRAWS, Scale, refit, too_small
from debiaskd.pipeline.identification import train_identification
from debiaskd.pipeline.last_layer import last_layer
from debiaskd.pipeline.refits import halves, held_out, refitted
from debiaskd.recipe import REFITS, Recipe, RecipeError, RefitOptions, Teacher
from debiaskd.reweight import error_weights, group_weights
from debiaskd.terms import GroupDroOptions, SupervisedOptions, TermOptions
from debiaskd.training.batches import Split
from debiaskd.training.feature_extraction import iterate_outputs
from debiaskd.training.fit import Trainer
from debiaskd.training.run import Stage
from debiaskd.training.schedule import brief_schedule
from debiaskd.training.split_parts import divided
from debiaskd.utils import files


def trained_options(recipe: Recipe) -> Teacher:
    """The recipe's teacher, which the run trains.

    Raises:
        RecipeError: there is none, or it is given by its weights.
    """
    if recipe.teacher is None:
        raise RecipeError("--only teacher: the recipe has no teacher")
    if not recipe.teacher.is_trained:
        raise RecipeError("--only teacher: teacher.method is checkpoint, so that there is no teacher to be trained")
    return recipe.teacher


def teacher_terms(options: Teacher) -> dict[str, TermOptions]:
    """The loss terms of a teacher's training; those of jtt are weighted."""
    if options.method == "group_dro":
        return {"group_dro": GroupDroOptions(step_size=0.01 if options.step_size is None else options.step_size)}
    return {"supervised": SupervisedOptions(weighted=options.method == "jtt")}


def trained_teacher(context: StageContext, options: Teacher) -> Stage:
    """The stage that trains the teacher."""
    assert options.schedule is not None
    groups, schedule = context.trainer.train.groups, options.schedule
    terms = teacher_terms(options)
    weight: Callable[[], Tensor] | None = None  # not before the stage that needs it is made
    sampling = None
    inputs = {**context.base, **context.common(), **context.trainer.contracts.decisive(options)}
    inputs["teacher"] = dict(context.run.document["teacher"])
    if options.method in ("balanced", "group_dro"):
        assert groups is not None
        sampling = group_weights(groups)  # group DRO draws its groups alike, too (Sagawa et al. 2020, algorithm 1)
    if options.method == "jtt":
        assert options.up is not None
        identification = brief_schedule(schedule, options.identification_epochs)
        correct, fingerprint = train_identification(context, "teacher-identification", options, identification)
        inputs["identification"] = fingerprint
        up = options.up

        def weight() -> Tensor:
            return context.scatter_weights(error_weights(correct(), up))

    plain = options.method == "dfr" or options.method in REFITS
    name = "teacher-erm" if plain else "teacher"
    training = context.trainer.train
    if plain:
        inputs["teacher"]["method"] = "erm"  # which it is so far
    if options.method in REFITS:
        training, held = held_out(context, options.refit or RefitOptions(), options.method)
        inputs["teacher"]["refit"], inputs["held out"] = None, 0 if held is None else len(held)

    def make(folder: Path, fingerprint: str) -> dict[str, Any]:
        return context.trainer.fit(
            name,
            folder,
            fingerprint,
            context.trainer.network(options, "teacher"),
            terms,
            schedule,
            weight=None if weight is None else weight(),
            sampling=sampling,
            network=options,
            training=training,
        )

    stage = context.run.stage(name, inputs, make)
    if options.method in REFITS:
        return refitted(
            context,
            "teacher",
            options,
            options.method,
            options.refit or RefitOptions(),
            stage,
            lambda: context.trainer.network(options, "teacher"),
            schedule,
        )
    return stage if options.method != "dfr" else _refitted(context, options, stage)


def _refitted(context: StageContext, options: Teacher, erm: Stage) -> Stage:
    def make(folder: Path, fingerprint: str) -> dict[str, Any]:
        model = context.trainer.network(options, "teacher").to(context.fabric.device).eval()
        load_weights(model, erm.model)
        facts = _refit(context, options, model, last_layer(context.trainer, options, model, "teacher.method: dfr"))
        if context.fabric.is_global_zero:
            about = context.trainer.about("teacher", options)
            files.write(folder / "model.safetensors", lambda path: save_weights(model, path, about))
        context.fabric.barrier()
        return facts

    inputs = {"erm": erm.fingerprint, "method": "dfr", "draws": DRAWS, "share": options.validation_share or 1.0}
    # As it was before there were shares: a run that was begun then goes on with the teacher that it has.
    older = {"erm": erm.fingerprint, "method": "dfr", "fits": 10}
    return context.run.stage("teacher", inputs, make, older=older)


def _refit(
    context: StageContext, options: Teacher, model: nn.Module, classifier: nn.Linear | nn.Conv2d
) -> dict[str, Any]:
    intercept, split = classifier.bias is not None, context.trainer.validation
    assert split.groups is not None
    feature = torch.cat(list(_read(context, options, model, split)))
    # By the training images, as the authors' code does it: of the few that are fitted to, moments are uncertain.
    sums = [feature.new_zeros(()), feature.new_zeros(feature.shape[1]), feature.new_zeros(feature.shape[1])]
    for part in _read(context, options, model, context.trainer.train):
        for total, more in zip(sums, (part.new_tensor(float(len(part))), part.sum(0), part.square().sum(0))):
            total += more
    rows, _ = shares(context.trainer, options)
    made = refit(
        feature[rows],
        split.target[rows],
        split.groups[rows],
        Scale.from_sums(*sums, centred=intercept),
        intercept=intercept,
        seed=context.recipe.seed,
    )
    with torch.no_grad():
        classifier.weight.copy_(made.weight.reshape(classifier.weight.shape))
        if classifier.bias is not None:
            classifier.bias.copy_(made.bias)
    return {
        "strength": made.strength,
        "worst_group_accuracy_of_the_other_half": made.tuned[made.strength],
        "fitted_on": len(rows),
        "draws": DRAWS,
        "pictures_a_draw": made.draw,
    }


def _read(context: StageContext, options: Teacher, model: nn.Module, split: Split) -> Iterator[Tensor]:
    """Features [n,D] that the last layer reads of each batch of a split, in float64."""
    loader = context.trainer.loader(split, options, training=False, batch=256, alone=True)
    at = context.trainer.feature_layers(model, options, ("pooled",))
    for outputs in iterate_outputs(model, at, loader):
        assert outputs.pooled is not None
        yield outputs.pooled.double().cpu()


# -- validation that fitted a last layer ------------------------------------------------------------------------------


def shares(trainer: Trainer, options: Teacher) -> tuple[Tensor, Tensor]:
    """Numbers of the validation images that dfr fits the last layer to, and of the rest: of each group as large a
    part, drawn by `data.seed`."""
    groups = trainer.validation.groups
    assert groups is not None
    generator = torch.Generator().manual_seed(trainer.recipe.data.seed)
    return divided(groups, options.validation_share or 1.0, generator)


def check_dfr(trainer: Trainer, options: Teacher, *, begun: bool = False) -> None:
    """Check before training that dfr can use the validation images.

    Args:
        trainer, options: of the recipe.
        begun: the run was begun before; how it selects the student's epoch is not asked again.

    Raises:
        RecipeError: too few images of a class or a group; a rule that would select on what fitted the layer.
    """
    split, selection = trainer.validation, trainer.recipe.selection
    if split.groups is None:
        raise RecipeError("teacher.method: dfr needs groups of the validation images, and they have none")
    fitted, rest = shares(trainer, options)
    names = (split.whole.classes, split.whole.groups)
    problem = too_small(split.target[fitted], split.groups[fitted], split.num_classes, names=names)
    where = "validation images"
    if problem is None and options.validation_share is not None:
        where = f"validation images, the share of {1 - options.validation_share:g} that selects the student's epoch"
        problem = too_small(split.target[rest], split.groups[rest], split.num_classes, least=1, names=names)
        lost = sorted(set(split.groups[fitted].tolist()) - set(split.groups[rest].tolist()))
        if problem is None and lost:
            problem = f"needs images of every group, and there are none of {split.whole.groups[lost[0]]}"
    if problem is not None:
        raise RecipeError(f"teacher.method: dfr {problem} ({where})")
    unmeasured = options.validation_share is None and not selection.reuse
    if unmeasured and trainer.recipe.schedule.patience is not None:
        raise RecipeError(
            "schedule.patience: all of validation fits the dfr teacher's last layer, so that no metric of the student "
            "is compared; say teacher.validation_share: 0.5, or selection.reuse: true"
        )
    if options.validation_share is None and selection.rule not in (None, "last") and not selection.reuse and not begun:
        raise RecipeError(
            f"selection.rule: {selection.rule} would select the student's epoch on the validation images that the "
            "dfr teacher's last layer is fitted on; say teacher.validation_share: 0.5, which keeps half of them for "
            "the selection, or selection.reuse: true, or leave the rule out, which keeps the last epoch"
        )


def student_selection(trainer: Trainer) -> dict[str, Any]:
    """The rule and the images that select the student's epoch, as arguments of `Trainer.fit`.

    Empty where validation fitted nothing.
    """
    recipe = trainer.recipe
    if recipe.teacher is not None and recipe.teacher.method == "evals":
        return {"validation": trainer.validation.part(halves(trainer)[1])}
    if recipe.teacher is None or recipe.teacher.method != "dfr" or recipe.selection.reuse:
        return {}
    if recipe.teacher.validation_share is not None:
        return {"validation": trainer.validation.part(shares(trainer, recipe.teacher)[1])}
    return {"rule": "last"} if recipe.selection.rule is None else {}
