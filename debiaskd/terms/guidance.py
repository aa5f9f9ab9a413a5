"""Model guidance: pull the attribution of one class per image into that class's boxes (Rao et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from debiaskd.attribution.explainer import has_bcos_layers
from debiaskd.attribution.guide import Guide
from debiaskd.attribution.maps import draw_target
from debiaskd.models.depths import DEPTHS
from debiaskd.ops.ignore import judged
from debiaskd.terms.backdoor import Intervened
from debiaskd.terms.deciding import DecidingTerm
from debiaskd.terms.state import State, StepInputs, TermOptions


@dataclass
class GuideOptions(TermOptions):
    """The localization loss of an attribution.

    Args:
        layer: Input, Mid1, Mid2, Mid3, Final, or a module's name.
        attribution: how the map is made; left out, bcos for networks of B-cos layers, else input_x_gradient.
        loss: how it is compared with the boxes.
        reduction: "mean" over the step's annotated images, or "sum", as the public code of the paper has it.
        steps: of integrated gradients; 32 if it is left out.
    """

    layer: str = "Final"
    attribution: Literal["input_x_gradient", "grad_cam", "bcos", "integrated_gradients"] | None = None
    loss: Literal["energy", "l1", "ppce", "rrr"] = "energy"
    reduction: Literal["mean", "sum"] = "mean"
    steps: int | None = None


class GuideTerm(DecidingTerm):
    needs: ClassVar[frozenset[str]] = frozenset({"boxes"})
    tallied = "inputs"

    def __init__(self, options: GuideOptions, guide: Guide) -> None:
        super().__init__(options, guide)
        self.guide = guide
        self.reduction = options.reduction

    def tally(self, inputs: StepInputs, logits: Tensor | None) -> dict[str, Tensor]:
        return {"guide.annotated": _annotated(inputs, _target(inputs))}

    def forward(self, state: State) -> Tensor:
        assert state.seen is not None
        target = _target(state)
        loss = self.guide.guide(state.seen, target, state.boxes, state.ignore).loss
        if self.reduction == "sum":
            return loss * state.parts  # which are averaged
        # The guide sums: how many images are annotated is a matter of the whole step.
        annotated = state.total("guide.annotated", _annotated(state, target)) / state.parts
        return loss / annotated.clamp(min=1 / state.parts)


def _target(inputs: StepInputs) -> Tensor:
    """The class that is guided in each image, drawn where it shows several; int64 [N], -1 for none."""
    target = inputs.target
    if not target.is_floating_point():
        return target
    return draw_target(target, noise=inputs.draws.rand(tuple(target.shape)))


def _annotated(inputs: StepInputs, target: Tensor) -> Tensor:
    return judged(inputs.boxes, target, inputs.ignore)[0].annotated.sum().to(torch.float32)


def make_guide(options: GuideOptions, model: torch.nn.Module) -> Guide:
    """Create the guide of a student; its loss is a sum over images, without the term's weight."""
    steps = 32 if options.steps is None else options.steps
    layer, attribution = options.layer, options.attribution
    if attribution is None:
        attribution = "bcos" if has_bcos_layers(model) else "input_x_gradient"
    if isinstance(model, Intervened) and layer not in DEPTHS:  # which is named as the student has it
        layer = f"student.{layer}"
    return Guide(model, layer, attribution, options.loss, reduction="sum", steps=steps)
