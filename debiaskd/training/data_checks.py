"""Check a recipe against its data, before anything is trained."""

from __future__ import annotations

import torch

from debiaskd.bias import found_names
from debiaskd.recipe import Recipe, RecipeError
from debiaskd.training.batches import Split
from debiaskd.training.split_parts import divided
from debiaskd.training.validation import has_boxes


def expect_groups(recipe: Recipe, train: Split, validation: Split) -> None:
    """Tell the splits which groups the recipe's discovery is going to find.

    Raises:
        RecipeError: several classes an image.
    """
    options = recipe.discovery
    if options is None:
        return
    if train.whole.multi_label:
        raise RecipeError("discovery: needs one class an image, here it may be several")
    names = found_names(train.whole.classes, options.clusters)
    for split in (train, validation):
        split.expect(names, as_groups=recipe.data.groups == "found")


def check_data(recipe: Recipe, split: Split, validation: Split) -> None:
    """Raise RecipeError if the data lacks what the recipe asks for.

    Args:
        recipe: as checked.
        split, validation: the training split and the one that selects the epoch.
    """
    if split.whole.multi_label:
        for name in ("kd", "relation", "backdoor"):  # kd softens a softmax
            if getattr(recipe.terms, name) is not None:
                raise RecipeError(f"terms.{name}: needs one class an image, here it may be several")
        if recipe.data.mixing is not None:
            raise RecipeError(f"{recipe.data.mixing}: needs one class an image, here it may be several")
        if recipe.weights is not None and recipe.weights.method == "errors":
            raise RecipeError("weights.method: errors needs one class an image, here it may be several")
        if recipe.teacher is not None and recipe.teacher.method == "jtt":
            raise RecipeError("teacher.method: jtt needs one class an image, here it may be several")
        if recipe.terms.supervised is not None and recipe.terms.supervised.label_smoothing:
            raise RecipeError("terms.supervised.label_smoothing: needs one class an image, here there may be more")
    grouped = recipe.weights is not None and recipe.weights.method == "groups"
    if recipe.teacher is not None and recipe.teacher.method in ("balanced", "group_dro", "dfr"):
        grouped = True
    grouped = grouped or (recipe.teacher is not None and recipe.teacher.probe == "groups")
    if split.groups is None and grouped:
        hint = "those of your own images come from bias.csv (`debiaskd prepare folder`)"
        raise RecipeError(f"data.path: groups are asked for, and the prepared data has none; {hint}")
    for name, term in recipe.terms.own.items():
        if "groups" in term.needs and split.groups is None:
            raise RecipeError(f"terms.{name}: needs groups, and the prepared data has none")
        if "boxes" in term.needs and not len(split.boxes.coords):
            raise RecipeError(f"terms.{name}: needs boxes, and the training images have none")
    if recipe.terms.explain is not None and recipe.terms.explain.target == "label" and split.whole.multi_label:
        raise RecipeError("terms.explain.target: label needs one class an image, here it may be several")
    if recipe.terms.guide is not None and not len(split.boxes.coords):
        raise RecipeError("terms.guide: the training images have no boxes")
    if recipe.selection.attributions and not has_boxes(validation):
        raise RecipeError("selection.attributions: the validation images have no boxes to compare them with")
    for name, schedule in recipe.schedules().items():
        if schedule.batch > len(split):
            found = f"{schedule.batch} images a step, and the training split has {len(split)}"
            raise RecipeError(f"{name}.batch: {found}")


def hold_out(recipe: Recipe, train: Split, share: float) -> tuple[Split, Split]:
    """Divide the training images into (a share of each class that nothing trains on, the rest).

    Raises:
        RecipeError: several classes an image, or no image is left to train on.
    """
    if train.whole.multi_label:
        raise RecipeError("refit: needs one class an image, here it may be several")
    held, rest = divided(train.target, share, torch.Generator().manual_seed(recipe.data.seed))
    if not len(rest):
        raise RecipeError(f"refit.holdout: {share} of {len(train)} training images leaves none to train on")
    return train.part(held), train.part(rest)
