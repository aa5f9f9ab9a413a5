"""What a recipe can say where the bias is not annotated: how groups are found, and how last layers are refitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class Discovery:
    """Groups within each class, found from a plainly trained student, without any annotation of them: environments of
    validation for the selection and, with `data.groups: found`, groups for all that needs groups.

    Args:
        method: "environments": two in each class, which EIIL tells apart by the plain model's logits; "clusters" of its
            features and of its losses after the first epochs.
        epochs: of the plain training, by the recipe's schedule; 1 if it is left out.
        most: clusters in a class at most; 4 if it is left out.
        smallest: images in a cluster at least; 20 if it is left out.
        early: epochs after which losses are looked at, for clusters; 1 if it is left out.
    """

    method: Literal["environments", "clusters"] = "environments"
    epochs: int | None = None
    most: int | None = None
    smallest: int | None = None
    early: int | None = None

    @property
    def clusters(self) -> int:
        """Groups in a class at most."""
        return 2 if self.method == "environments" else self.most or 4


#: Methods that refit a last layer without annotation of the bias.
REFITS = ("afr", "self", "class_balanced", "evals")


@dataclass
class RefitOptions:
    """How a last layer is refitted. What is left out of gamma, pull and count is chosen on validation, by the worst
    known group where the recipe selects by that, else by the worst environment.

    Args:
        holdout: share of each class's training images that the network's training never sees, and that the layer is
            fitted to; 0.2 if it is left out. Not for evals, which fits it to half of validation.
        gamma: for afr: how much more images weigh that the network is unsure of.
        pull: towards the old layer; for evals, strength of the L1 penalty.
        count: images that the layer is fitted to: for self in all, for evals of each class on either side.
        early: for self: epochs of the briefly trained network that the final one is compared with; 1 if it is left out.
    """

    holdout: float | None = None
    gamma: float | None = None
    pull: float | None = None
    count: int | None = None
    early: int | None = None

    @property
    def share(self) -> float:
        """Of each class's training images, those that are held out."""
        return 0.2 if self.holdout is None else self.holdout


@dataclass
class Refit(RefitOptions):
    """The student's last layer refitted once it is trained, without annotation of the bias. The held-out images are
    seen by no training of the recipe.

    Args:
        method: see the teacher's.
    """

    method: Literal["afr", "self", "class_balanced", "evals"] = "afr"
