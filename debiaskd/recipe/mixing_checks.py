"""Check that all of a recipe can follow images that are mixed with others (`data.mixup`, `data.cutmix`).

A mixed image shows two classes, each by a share. A loss of the images alone holds for it, and so does a loss that is
linear in the target. What is said of one image (its weight, its boxes, a cached teacher output) holds for neither, and
what a network gets wrong or is unsure of says little about images if it was trained on mixed ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from debiaskd.recipe.options import Recipe

#: Why a term of the package cannot follow.
_TERMS = {
    "relation": "which compares images of one class",
    "backdoor": "whose contexts and labels are of one class an image",
    "guide": "whose boxes lie in one of two mixed images",
    "explain": "whose maps explain one class an image",
}
#: Methods that read which images a trained network gets wrong or is unsure of.
_BY_MISTAKES = ("jtt", "afr", "self", "evals")


def mixing_problems(recipe: Recipe) -> Iterator[str]:
    """What cannot follow mixed images; nothing where images are not mixed."""
    key = recipe.data.mixing
    if key is None:
        return
    for name in recipe.terms.given():
        own = recipe.terms.own.get(name)
        if own is not None and own.kind is None:  # of a run that is only read
            continue
        if not recipe.terms.kind(name).mixes:
            why = _TERMS[name] if own is None else f"since {own.of} does not say that it `mixes`"
            yield f"{key}: not with terms.{name}, {why}"
    teacher, weights = recipe.teacher, recipe.weights
    if teacher is not None:
        if teacher.cache is not None:
            yield f"{key}: not with teacher.cache, whose outputs are of images that are not mixed"
        if teacher.method == "group_dro":
            yield f"{key}: not with teacher.method group_dro, whose losses are of one group an image"
        if teacher.method in _BY_MISTAKES:
            yield f"{key}: not with teacher.method {teacher.method}, which reads what a network gets wrong"
    if weights is not None and weights.method == "errors":
        yield f"{key}: not with weights.method errors, which reads what a network gets wrong"
    if weights is not None and not weights.draw:
        yield f"{key}: not with weights, which are of one image each; weights.draw: true draws images by them"
    if recipe.discovery is not None:
        yield f"{key}: not with discovery, which reads what a network gets wrong"
    if recipe.refit is not None and recipe.refit.method in _BY_MISTAKES:
        yield f"{key}: not with refit.method {recipe.refit.method}, which reads what a network gets wrong"
    for name, schedule in recipe.schedules().items():
        if schedule.batch < 2 * schedule.accumulate:
            images = f"{name}.batch={schedule.batch} with accumulate={schedule.accumulate} has fewer"
            yield f"{key}: mixes images of one pass, which needs two; {images}"
