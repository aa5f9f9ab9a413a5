"""Explanations as a signal: the student's attribution maps are pulled to the teacher's (e²KD).

Parchami-Araghi et al. 2024, "Good Teachers Explain: Explanation-Enhanced Knowledge Distillation" (arXiv 2402.03119).
Neither boxes nor labels are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from debiaskd.attribution.explainer import Explainer
from debiaskd.models.depths import DEPTHS
from debiaskd.ops.map_cosine import map_cosine_loss
from debiaskd.terms.backdoor import Intervened
from debiaskd.terms.deciding import DecidingTerm
from debiaskd.terms.state import State, TermOptions


@dataclass
class ExplainOptions(TermOptions):
    """1 minus the cosine between the student's and the teacher's attribution maps of one class.

    Args:
        layer: of the student: Input, Mid1, Mid2, Mid3, Final, or a module's name; left out, Input for bcos_weights,
            else Final.
        teacher_layer: of the teacher; left out, the same depth as the student's.
        attribution: how both maps are made. bcos_weights are the dynamic weights of B-cos networks at their input. Left
            out, bcos_weights where both are B-cos networks, else grad_cam.
        target: the class that is explained: the one that the teacher ranks first, or the label.
        weighted: by the recipe's sample weights.
    """

    layer: str | None = None
    teacher_layer: str | None = None
    attribution: Literal["grad_cam", "input_x_gradient", "bcos_weights"] | None = None
    target: Literal["teacher", "label"] = "teacher"
    weighted: bool = False


class ExplainTerm(DecidingTerm):
    needs: ClassVar[frozenset[str]] = frozenset({"teacher.explanation", "teacher.explained"})

    def __init__(self, options: ExplainOptions, explainer: Explainer) -> None:
        super().__init__(options, explainer)
        self.explainer, self.weighted = explainer, options.weighted

    def forward(self, state: State) -> Tensor:
        assert state.watched is not None and state.teacher is not None
        teacher, target = state.teacher.explanation, state.teacher.explained
        assert teacher is not None and target is not None
        student, shares = self.explainer.maps(state.watched, target), state.shares(self.weighted)
        for role, maps in (("student", student), ("teacher", teacher)):
            if maps.shape[-2:] == (1, 1):
                raise ValueError(
                    f"terms.explain: the {role}'s map is 1×1, which is the same wherever it looks; name an earlier "
                    "layer, or give larger images"
                )
        teacher = teacher.to(student.dtype)
        return map_cosine_loss(student, teacher, shares, reduction="mean" if shares is None else "sum")


def make_explainer(options: ExplainOptions, model: nn.Module, role: str = "student") -> Explainer:
    """Create the explainer of a student or of its teacher.

    Raises:
        ValueError: the model has no such layer, or no B-cos layers; or `teacher_layer` is missing.
    """
    layer = options.layer
    if role == "teacher":
        if options.teacher_layer is None and layer is not None and layer not in DEPTHS:
            raise ValueError(f"teacher_layer must be named, because layer is one of the student, {layer!r}")
        layer = options.teacher_layer or layer
    elif layer is not None and isinstance(model, Intervened) and layer not in DEPTHS:
        layer = f"student.{layer}"  # which is named as the student has it
    return Explainer(model, layer, options.attribution)
