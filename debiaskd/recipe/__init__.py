"""Recipes: YAML files that say what a run is, typed by dataclasses, checked before anything is loaded."""

from debiaskd.recipe.checking import check
from debiaskd.recipe.options import (
    Compute,
    Data,
    Network,
    Recipe,
    Schedule,
    Selection,
    Teacher,
    Terms,
    Transplant,
    Weights,
)
from debiaskd.recipe.reading import RecipeError, names, read, to_dict

__all__ = [
    "Compute",
    "Data",
    "Network",
    "Recipe",
    "RecipeError",
    "Schedule",
    "Selection",
    "Teacher",
    "Terms",
    "Transplant",
    "Weights",
    "check",
    "names",
    "read",
    "to_dict",
]
