"""Recipes: YAML files that describe a run, typed by dataclasses, checked before anything is loaded."""

from debiaskd.recipe.bias_options import REFITS, Discovery, Refit, RefitOptions
from debiaskd.recipe.checking import check
from debiaskd.recipe.compute_options import Compute
from debiaskd.recipe.options import (
    Data,
    Input,
    Network,
    Recipe,
    Selection,
    Teacher,
    Terms,
    Transplant,
    Weights,
)
from debiaskd.recipe.reading import RecipeError, names, read, to_dict
from debiaskd.recipe.schedule_options import Schedule

__all__ = [
    "REFITS",
    "Compute",
    "Data",
    "Discovery",
    "Input",
    "Network",
    "Recipe",
    "RecipeError",
    "Refit",
    "RefitOptions",
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
