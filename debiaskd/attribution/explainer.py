"""Attribution maps that a student is to share with its teacher: e²KD (Parchami-Araghi et al. 2024, arXiv 2402.03119).

    L = L_kd + weight · mean_i (1 - cos(student's map, teacher's map))    of the class that the teacher ranks first

`attributor.py` computes the maps; the loss is that of `debiaskd.ops.map_cosine`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from debiaskd.attribution.attributor import Attributor, Seen, outside_inference_mode
from debiaskd.attribution.gradients import scaled_gradients
from debiaskd.attribution.maps import explanation_mode
from debiaskd.models.wrappers import as_read, statistics_kept, unwrap
from debiaskd.utils import checks

#: Kinds of maps; "bcos_weights" are those of the input.
EXPLANATIONS = ("grad_cam", "input_x_gradient", "bcos_weights")
#: Attributions of a guide whose forward pass an explainer of the same layer can use.
_PLAIN = ("input_x_gradient", "grad_cam")


class Explained(NamedTuple):
    """A model's answer to a batch, and its attribution maps.

    logits: [N,K].
    target: int64 [N], the class that is explained in each image.
    maps: [N,h,w] at the layer's size; [N,C,H,W] for "bcos_weights".
    """

    logits: Tensor
    target: Tensor
    maps: Tensor


class Explainer(Attributor):
    """Compute a model's logits together with the attribution maps that explanations are compared by (e²KD).

    Args:
        model: any module from images [N,3,H,W] to logits [N,K]. It is not copied.
        layer: as for `dk.Guide`; None: "Input" for "bcos_weights", else "Final".
        attribution: "grad_cam" or "input_x_gradient", in closed form where only pooling and a linear layer follow the
            layer; "bcos_weights": the dynamic weights of a B-cos network at its input, ∂logit/∂x [N,C,H,W] in
            explanation mode, not multiplied by the input. None: "bcos_weights" for a network of B-cos layers, else
            "grad_cam".

    "bcos_weights" runs the model again without updating batch norm's statistics.

    Raises:
        TypeError, ValueError: invalid arguments, no such layer; with the first batch, a layer whose attribution is 0
            everywhere.

    Example:
        >>> import torch, debiaskd as dk
        >>> from debiaskd.models import SmallNet
        >>> teacher, student = (SmallNet((4, width), (2, 2), num_classes=3) for width in (16, 8))
        >>> images = torch.randn(2, 3, 16, 16)
        >>> taught = dk.Explainer(teacher.eval()).explain(images)
        >>> logits, _, maps = dk.Explainer(student)(images, taught.target)
        >>> loss = dk.kd_loss(logits, taught.logits) + dk.map_cosine_loss(maps, taught.maps)
        >>> loss.backward(); maps.shape
        torch.Size([2, 4, 4])
    """

    def __init__(self, model: nn.Module, layer: str | None = None, attribution: str | None = None) -> None:
        if attribution is None:
            attribution = "bcos_weights" if has_bcos_layers(model) else "grad_cam"
        checks.option("attribution", attribution, EXPLANATIONS)
        weights = attribution == "bcos_weights"
        if weights and layer not in (None, "Input"):
            raise ValueError(f"layer must be 'Input' for bcos_weights, got {layer!r}")
        if layer is None:
            layer = "Input" if weights else "Final"
        super().__init__(model, layer, "bcos" if weights else attribution)
        self.explanation = attribution

    def __call__(self, images: Tensor, target: Tensor | None = None) -> Explained:
        """Run the model and return its logits and maps, with a graph to train through where gradients are enabled.

        Args:
            images: [N,3,H,W].
            target: int64 [N], the class to explain in each image; None: the class that the model ranks first.
        """
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return self.explain(images, target)
        seen = self.watch(images)
        target = _target(seen, target)
        return Explained(seen.logits, target, self.maps(seen, target))

    def explain(self, images: Tensor, target: Tensor | None = None) -> Explained:
        """Return what a call does without a graph, as for a teacher."""
        with self._gradients(not self.closed_form):  # a gradient makes the map, wanted or not
            seen = self.watch(images)
            target = _target(seen, target)
            maps = self._maps(seen, outside_inference_mode(target), create_graph=False)
        return Explained(seen.logits.detach(), target, maps.detach())

    def maps(self, seen: Seen, target: Tensor) -> Tensor:
        """Compute the maps from the result of `watch`, of this or of an attributor that it `can_use`."""
        return self._maps(seen, target, create_graph=torch.is_grad_enabled())

    def can_use(self, other: Attributor) -> bool:
        """Whether one forward pass that `other` watches serves both; both are of one model."""
        if self.explanation == "bcos_weights":
            return True
        return other.layer == self.layer and other.attribution in _PLAIN and other.statistics == self.statistics

    def decide_with(self, other: Attributor) -> None:
        """Make the decisions on the layer and on its closed form together with one that it `can_use`."""
        if self.explanation != "bcos_weights":
            self._depth = other._depth
            self._classifiers, self._independent = other._classifiers, other._independent

    def _bcos(self, images: Tensor, target: Tensor, create_graph: bool) -> Tensor:
        model = unwrap(self.model)
        inner = Attributor(model, self.layer)
        inner.use_gradients()
        with explanation_mode(model), statistics_kept(model), torch.enable_grad():
            seen = inner.watch(as_read(model, images))
            gradients, scale = scaled_gradients(seen.scores, seen.raw, target, create_graph=create_graph)
            with torch.set_grad_enabled(create_graph):
                return gradients[0] / scale


def has_bcos_layers(model: nn.Module) -> bool:
    """Whether a model has modules with an explanation mode."""
    return any(callable(getattr(module, "set_explanation_mode", None)) for module in model.modules())


def _target(seen: Seen, target: Tensor | None) -> Tensor:
    if target is None:
        return seen.logits.detach().argmax(1)
    return checks.tensor("target", target)
