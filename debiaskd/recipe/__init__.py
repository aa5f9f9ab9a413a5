"""Recipes: YAML files that say what a run is, typed by dataclasses, checked before anything is loaded."""

from debiaskd.recipe.checking import check
from debiaskd.recipe.options import (
    Compute,
    Data,
    Input,
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
    "Input",
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
