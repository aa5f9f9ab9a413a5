"""What the stages of one recipe share: the run's folder, the fingerprints of its inputs, and what trains them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.recipe import Recipe
from debiaskd.training.fit import Trainer
from debiaskd.training.run import Run, decisive

#: Keys of `data` that only change boxes and masks, so that stages without guidance are the same.
BOX_KEYS = ("annotated_fraction", "dilate", "jitter", "masks")


class StageContext:
    """Passed to every function that builds a stage.

    Attributes:
        recipe: as checked.
        fabric: launched.
        trainer: trains the recipe's networks.
        student_network: the student as it starts, before it gets a teacher's head.
        run: the run's folder.
        base: fingerprint inputs of every stage: the data, and the files of weights that training starts from.
    """

    recipe: Recipe
    fabric: Any
    trainer: Trainer
    student_network: nn.Module
    run: Run
    base: dict[str, Any]

    def common(self) -> dict[str, Any]:
        """Fingerprint inputs of every stage that trains a network."""
        everything = decisive(self.run.document)
        data = {k: v for k, v in everything["data"].items() if k not in BOX_KEYS}
        found = {"pictures": data, "seed": self.recipe.seed}
        return found | {key: everything[key] for key in ("compute", "selection") if key in everything}

    def scatter_weights(self, weights: Tensor) -> Tensor:
        """Scatter weights of the training images to the whole prepared split, by sample number."""
        whole = torch.zeros(len(self.trainer.train.whole))
        whole[self.trainer.train.numbers] = weights
        return whole
