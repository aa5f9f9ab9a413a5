"""What a recipe's teacher is worth before anything is trained."""

from __future__ import annotations

import dataclasses

from debiaskd.evaluation.evaluate import THRESHOLD
from debiaskd.recipe import Recipe
from debiaskd.training.batches import open_split
from debiaskd.training.fabric import launch
from debiaskd.training.fit import Trainer
from debiaskd.training.validation import Evaluator, attribution_options


def measure_teacher(recipe: Recipe, split: str) -> dict[str, float | None]:
    """The metrics of a teacher that is given by a file, on a split of the recipe's data, as fractions.

    Args:
        recipe: with a teacher of method "checkpoint" and a last layer for the data's classes.
        split: such as "val".

    Raises:
        RecipeError, DataError, NetworkError: as their names say.
    """
    assert recipe.teacher is not None
    fabric = launch(recipe.compute)
    trainer = Trainer(recipe, fabric, lambda task, done, news: None)
    model = trainer.network(recipe.teacher, "teacher").to(fabric.device).eval()
    found = open_split(dataclasses.replace(recipe.data, test=split), "test")
    loader = trainer.loader(found, recipe.teacher, training=False, batch=64, alone=True)
    evaluation = Evaluator(
        loader, trainer.train.groups, attribution_options(recipe, "teacher"), THRESHOLD, autocast=fabric.autocast
    )
    return {name: value if value == value else None for name, value in evaluation(model).items()}
