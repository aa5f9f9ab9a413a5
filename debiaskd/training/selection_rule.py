"""Decide by which validation metrics the epoch is selected."""

from __future__ import annotations

from debiaskd.recipe import Recipe, RecipeError
from debiaskd.training.batches import Split
from debiaskd.training.selection import RULES
from debiaskd.training.validation import available_metrics

#: What a rule selects by, for `stage.json`.
DESCRIPTIONS = {
    "worst_group": "worst-group accuracy on validation, whose groups are known; the later of equals",
    "worst_environment": "worst-environment accuracy on validation, whose groups were found, not known; the later of "
    "equals",
    "accuracy": "average accuracy on validation; the later of equals",
    "f1": "F1 on validation; the later of equals",
    "pareto": "Pareto front over {} on validation, in bins of 0.005; the highest sum in front",
    "last": "the last epoch",
}


def selection_rule(recipe: Recipe, validation: Split, *, guided: bool) -> str:
    """The recipe's rule, or the default for the metrics that the validation images allow."""
    rule, names = recipe.selection.rule, available_metrics(validation)
    if rule is None:
        if "worst_group_accuracy" in names:
            return "worst_group"
        if "worst_environment_accuracy" in names:
            return "worst_environment"
        guided = guided and recipe.selection.attributions is not False
        return "pareto" if guided and "epg" in names else "accuracy" if "accuracy" in names else "f1"
    return rule


def rule_metrics(rule: str, validation: Split) -> tuple[str, ...]:
    """Names of the validation metrics that a rule compares.

    Raises:
        RecipeError: the validation images do not give one of them.
    """
    found = available_metrics(validation)
    wanted = tuple("accuracy" if n == "f1" and rule == "pareto" and n not in found else n for n in RULES[rule])
    missing = [name for name in wanted if name not in found]
    if missing:
        there = ", ".join(found) or "none"
        hint = "; `discovery: {}` finds environments" if rule == "worst_environment" else ""
        raise RecipeError(f"selection.rule: {rule} needs {missing[0]}, and the validation images give {there}{hint}")
    return wanted
