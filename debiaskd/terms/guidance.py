"""Model guidance as a term: one class an image, its attribution pulled into that class's boxes (Rao et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from debiaskd.attribution import draw_target
from debiaskd.depths import DEPTHS
from debiaskd.guide import Guide
from debiaskd.ignoring import judged
from debiaskd.terms.backdoor import Intervened
from debiaskd.terms.state import State, Term, TermOptions


@dataclass
class GuideOptions(TermOptions):
    """The localization loss of an attribution.

    Args:
        layer: Input, Mid1, Mid2, Mid3, Final, or a module's name.
        attribution: how the map is made; left out, bcos for networks of B-cos layers, else input_x_gradient.
        loss: how it is compared with the boxes.
        reduction: "mean" over annotated images, or "sum", as the public code of the paper has it.
        steps: of integrated gradients; 32 if it is left out.
    """

    layer: str = "Final"
    attribution: Literal["input_x_gradient", "grad_cam", "bcos", "integrated_gradients"] | None = None
    loss: Literal["energy", "l1", "ppce", "rrr"] = "energy"
    reduction: Literal["mean", "sum"] = "mean"
    steps: int | None = None


class GuideTerm(Term):
    needs: ClassVar[frozenset[str]] = frozenset({"boxes"})

    def __init__(self, options: GuideOptions, guide: Guide) -> None:
        super().__init__(options)
        self.guide = guide
        self.reduction = options.reduction

    def forward(self, state: State) -> Tensor:
        assert state.seen is not None
        target = state.target
        if target.is_floating_point():
            target = draw_target(target, noise=state.draws.rand(tuple(target.shape)))
        loss = self.guide.guide(state.seen, target, state.boxes, state.ignore).loss
        if self.reduction == "sum":
            return loss * state.ranks.world_size  # gradients are averaged over ranks
        # The guide sums: how many images are annotated is a matter of all ranks.
        annotated = judged(state.boxes, target, state.ignore)[0].annotated.sum()
        return loss / state.ranks.mean(annotated.to(torch.float32)).clamp(min=1 / state.ranks.world_size)


def make_guide(options: GuideOptions, model: torch.nn.Module) -> Guide:
    """The guide that watches the student; its loss is a sum over images, without the term's weight."""
    steps = 32 if options.steps is None else options.steps
    layer, attribution = options.layer, options.attribution
    if attribution is None:
        explained = any(callable(getattr(module, "set_explanation_mode", None)) for module in model.modules())
        attribution = "bcos" if explained else "input_x_gradient"
    if isinstance(model, Intervened) and layer not in DEPTHS:  # which is named as the student has it
        layer = f"student.{layer}"
    return Guide(model, layer, attribution, options.loss, reduction="sum", steps=steps)
