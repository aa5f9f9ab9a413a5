"""What a recipe can say where the bias is not annotated: how groups are found."""

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
