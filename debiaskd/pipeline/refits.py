"""Last layers of teachers and students refitted without annotation of the bias: afr, self, class_balanced, evals.

The network's training never sees the images that the layer is fitted to (of evals: half of validation). What a method
leaves open, such as AFR's γ and the pull towards the old layer, is chosen on validation by the accuracy of the worst
group: of known groups where the recipe selects by these, else of the environments that were found there, else of the
environments of the network's own logits before the refit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.bias import find_environments
from debiaskd.models.registry import load_weights, save_weights
from debiaskd.pipeline.context import StageContext
from debiaskd.pipeline.discovery import outputs
from debiaskd.pipeline.last_layer import last_layer
from debiaskd.pipeline.layer_fits import COUNTS, GAMMAS, PULLS, STRENGTHS, Fit, Material, best_fit
from debiaskd.recipe import Network, RecipeError, RefitOptions, Schedule
from debiaskd.terms import SupervisedOptions, TermOptions
from debiaskd.training.batches import Split
from debiaskd.training.fit import Trainer
from debiaskd.training.run import Stage
from debiaskd.training.schedule import brief_schedule
from debiaskd.training.split_parts import divided
from debiaskd.training.validation import Evaluator, attribution_options
from debiaskd.utils import files

# -- images -----------------------------------------------------------------------------------------------------------


def held_out(context: StageContext, options: RefitOptions, method: str) -> tuple[Split, Split | None]:
    """(training images that a network may see, those that its last layer is fitted to; None for evals).

    Of each class as large a share, drawn by `data.seed`. Where a student's refit holds images out of the whole recipe,
    a teacher's uses the same.
    """
    trainer = context.trainer
    if method == "evals":
        return trainer.train, None
    if trainer.heldout is not None:
        return trainer.train, trainer.heldout
    held, rest = divided(trainer.train.target, options.share, generator(trainer))
    return trainer.train.part(rest), trainer.train.part(held)


def generator(trainer: Trainer) -> torch.Generator:
    """Decides which images are held out."""
    return torch.Generator().manual_seed(trainer.recipe.data.seed)


def halves(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """FeatureLayers in validation of the half that evals fits the layer to, and of the half that chooses."""
    return divided(trainer.validation.target, 0.5, generator(trainer))


def tuning_groups(context: StageContext, split: Split, logits: Tensor, method: str) -> Tensor:
    """int64 [N], the groups whose worst accuracy chooses among fits; see the module."""
    if method != "evals" and split.groups is not None and context.trainer.rule == "worst_group":
        return split.groups
    if split.environments is not None:
        return split.environments
    return find_environments(logits, split.target).ids(2)


# -- stages -----------------------------------------------------------------------------------------------------------


def refitted(
    context: StageContext,
    name: str,
    network: Network,
    method: str,
    options: RefitOptions,
    trained: Stage,
    model: Callable[[], nn.Module],
    schedule: Schedule,
) -> Stage:
    """The stage whose model is that of `trained` with its last layer refitted.

    Args:
        context: of the recipe.
        name: of the stage, "teacher" or "student".
        network: of the recipe.
        method, options: of the refit.
        trained: the stage that trained the network.
        model: makes it, with weights of no meaning.
        schedule: of its training, by which self's early model is trained briefly.
    """
    trainer = context.trainer
    seen, held = held_out(context, options, method)
    inputs: dict[str, Any] = {"trained": trained.fingerprint, "refit": method, "options": dict(vars(options))}
    inputs |= {"tried": [GAMMAS, PULLS, COUNTS, STRENGTHS], "rule": trainer.rule}
    early = None
    if method == "self":
        early = _early(context, f"{name}-early", network, options, seen, schedule)
        inputs["early"] = early.fingerprint

    def make(folder: Path, fingerprint: str) -> dict[str, Any]:
        made = model().to(context.fabric.device).eval()
        load_weights(made, trained.model)
        layer = last_layer(trainer, network, made, f"{name}'s refit: {method}")
        fit = _fit(context, network, method, options, made, layer, held, early)
        with torch.no_grad():
            layer.weight.copy_(fit.layer[0].reshape(layer.weight.shape))
            if layer.bias is not None and fit.layer[1] is not None:
                layer.bias.copy_(fit.layer[1])
        if context.fabric.is_global_zero:
            about = trainer.about("teacher" if name == "teacher" else "student", network)
            files.write(folder / "model.safetensors", lambda path: save_weights(made, path, about))
        context.fabric.barrier()
        facts = {"method": method, "settings": fit.settings, "worst_group_of_tuning": fit.worst}
        figures = _figures(context, name, network, made, trained)
        return {**trained.facts, "refit": facts, "figures": figures}

    return context.run.stage(name, inputs, make)


def _early(
    context: StageContext, name: str, network: Network, options: RefitOptions, seen: Split, schedule: Schedule
) -> Stage:
    """The briefly trained network that self compares the final one with."""
    shortened = brief_schedule(schedule, options.early)
    inputs = {**context.base, **context.common(), **context.trainer.contracts.decisive(network)}
    inputs |= {"network": network.name, "schedule": dict(vars(shortened)), "holdout": options.share}

    def make(folder: Path, fingerprint: str) -> dict[str, Any]:
        model = context.trainer.network(network, name)
        terms: dict[str, TermOptions] = {"supervised": SupervisedOptions()}
        return context.trainer.fit(
            name, folder, fingerprint, model, terms, shortened, rule="last", network=network, training=seen
        )

    return context.run.stage(name, inputs, make)


def _fit(
    context: StageContext,
    network: Network,
    method: str,
    options: RefitOptions,
    model: nn.Module,
    layer: nn.Linear | nn.Conv2d,
    held: Split | None,
    early: Stage | None,
) -> Fit:
    trainer, validation = context.trainer, context.trainer.validation
    tuned = validation
    if held is None:
        first, other = halves(context.trainer)
        held, tuned = validation.part(first), validation.part(other)
    read = outputs(context, model, network, held)
    chosen_by = outputs(context, model, network, tuned)
    before = None
    if early is not None:
        brief_model = trainer.network(network, early.folder.name)
        load_weights(brief_model, early.model)
        before = outputs(context, brief_model, network, held)
    groups = tuning_groups(context, tuned, chosen_by.logits, method)
    material = Material(read, held.target, before, chosen_by, tuned.target, groups)
    weight = layer.weight.detach().flatten(1).cpu()
    bias = None if layer.bias is None else layer.bias.detach().cpu()
    return best_fit(method, options, (weight, bias), material)


def _figures(
    context: StageContext, name: str, network: Network, model: nn.Module, trained: Stage
) -> dict[str, float | None]:
    """What the refitted network is worth on validation, as for the one that was trained."""
    trainer = context.trainer
    pictures = trainer.loader(trainer.validation, network, training=False, batch=64)
    maps = "iou_threshold" in trained.facts["figures"]
    guide = attribution_options(context.recipe, name)
    evaluation = Evaluator(pictures, trainer.train.groups, guide, maps=maps, autocast=context.fabric.autocast)
    return {key: value if value == value else None for key, value in evaluation(model).items()}


def check_refit(
    context: StageContext, network: Network, model: nn.Module, options: RefitOptions, method: str, key: str
) -> None:
    """Refuse networks and data that a refit cannot work with, before anything is trained.

    Raises:
        RecipeError: naming the key.
    """
    trainer = context.trainer
    if trainer.train.whole.multi_label:
        raise RecipeError(f"{key}: {method} needs one class an image, here it may be several")
    last_layer(trainer, network, model, f"{key}: {method}")
    split = held_out(context, options, method)[1]
    if split is None:
        split = trainer.validation.part(halves(context.trainer)[0])
    missing = sorted(set(range(trainer.train.num_classes)) - set(split.target.unique().tolist()))
    if missing:
        name = trainer.train.whole.classes[missing[0]]
        raise RecipeError(f"{key}: {method} needs images of every class to fit the layer to, and has none of {name}")
