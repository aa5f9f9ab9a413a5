"""Model guidance: a model's attributions are pulled into the objects' boxes while it learns (Rao et al. 2023).

    L = L_cls + weight · L_loc(attribution of one class an image, that class's boxes)

At the last feature map behind global pooling and a linear head the attribution has a closed form (`attribution.py`): no
backward pass for it and no second-order graph. Whether that holds for a model is not guessed: the first batch goes both
ways, and only if they agree is the closed form taken from then on. Everywhere else the gradient is computed down to
the guided layer, no further, with a graph to train through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from debiaskd import checks
from debiaskd.attribution import (
    explanation_mode,
    final_layer_map,
    grad_cam,
    input_x_gradient,
    integrated_gradients,
    scaled_gradients,
)
from debiaskd.boxes import Boxes
from debiaskd.depths import Depth, check_layer, find, output_of, statistics_kept, unwrap
from debiaskd.features import Layout, close
from debiaskd.ignoring import judged
from debiaskd.ops.channel_dot import channel_dot
from debiaskd.ops.localization import KINDS, localization_loss

ATTRIBUTIONS = ("input_x_gradient", "grad_cam", "bcos", "integrated_gradients")


class Seen(NamedTuple):
    """A model's answer to a batch, and its feature map as the model lays it out."""

    logits: Tensor
    images: Tensor
    raw: Tensor


class Guided(NamedTuple):
    """What a guided step gives.

    logits: [N,K], for the loss of the task.
    loss: scalar, to be added to it; the guide's weight is in it.
    attribution: [N,h,w] of the layer's own size, raw, as it entered the loss.
    """

    logits: Tensor
    loss: Tensor
    attribution: Tensor


class Guide:
    """Guides a model's attributions into boxes.

    Args:
        model: any module from images [N,3,H,W] to logits [N,K]; inside of DistributedDataParallel, too. It is used, not
            copied.
        layer: "Input", "Mid1", "Mid2", "Mid3", "Final", or the name of a module whose output is a feature map
            [N,C,H,W], [N,H,W,C] or a grid of tokens [N,L,C].
        attribution: "input_x_gradient", "grad_cam", "bcos" or "integrated_gradients".
        loss: "energy", "l1", "ppce" or "rrr", as `dk.localization_loss`.
        weight: of the localization loss, λ ≥ 0.
        reduction: "mean" over annotated images, or "sum", as the public code of the paper has it.
        steps: of integrated gradients.

    B-cos and integrated gradients run the model again, with batch norm's statistics left alone. Random layers (dropout)
    draw anew then.

    Raises:
        TypeError, ValueError: arguments that do not fit, no such layer.

    Example:
        >>> import torch, debiaskd as dk
        >>> from debiaskd.models import SmallNet
        >>> model = SmallNet((4, 8), (2, 2), num_classes=3)
        >>> guide = dk.Guide(model, loss="energy", weight=0.1)
        >>> images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
        >>> boxes = dk.Boxes.from_lists([[[0, 0, 8, 8]], None])
        >>> logits, loss, attribution = guide(images, labels, boxes)
        >>> (torch.nn.functional.cross_entropy(logits, labels) + loss).backward()
        >>> attribution.shape, guide.closed_form
        (torch.Size([2, 4, 4]), True)
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str = "Final",
        attribution: str = "input_x_gradient",
        loss: str = "energy",
        weight: float = 1.0,
        *,
        reduction: str = "mean",
        steps: int = 32,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_layer(model, layer)
        checks.option("attribution", attribution, ATTRIBUTIONS)
        checks.option("loss", loss, tuple(KINDS))
        checks.option("reduction", reduction, ("mean", "sum"))
        if checks.integer("steps", steps) < 1:
            raise ValueError(f"steps must be an integer >= 1, got {steps}")
        if attribution == "bcos":
            with explanation_mode(model):  # which says so if there are no such layers
                pass
        self.model, self.layer, self.attribution, self.kind = model, layer, attribution, loss
        self.weight, self.reduction, self.steps = checks.number("weight", weight, minimum=0), reduction, steps
        self._depth: Depth | None = None
        #: Decided in training and in evaluation apart, since dropout differs.
        self._classifiers: dict[bool, nn.Linear | None] = {}
        if layer == "Input" or attribution == "bcos":
            self.use_gradients()

    @property
    def closed_form(self) -> bool | None:
        """Whether the closed form is used in the mode that the model is in; None until a batch has decided."""
        mode = self.model.training
        return self._classifiers[mode] is not None if mode in self._classifiers else None

    def use_gradients(self) -> None:
        """Never use the closed form."""
        self._classifiers = {False: None, True: None}

    def __call__(self, images: Tensor, target: Tensor, boxes: Boxes, ignore: Boxes | None = None) -> Guided:
        """One step: the model runs once, its logits come back together with the guidance loss.

        Args:
            images: [N,3,H,W].
            target: int64 [N], the class to guide in each image; -1 for none (`attribution.draw_target`).
            boxes: of N images, in pixels of the images. With labels, those of the target's class count; an annotated
                image whose target has no box has an empty mask. Images that are not annotated contribute nothing.
            ignore: areas whose pixels count neither as inside nor as outside, as in `dk.localization_loss`; with
                labels, those of the target's class count. Images that hold nothing of their target but such areas
                contribute nothing.
        """
        wanted = torch.is_grad_enabled()
        with torch.set_grad_enabled(wanted or not self.closed_form):  # a gradient makes the map, wanted or not
            step = self._guide(self.watch(images), target, boxes, ignore, create_graph=wanted)
        return step if wanted else Guided(*(part.detach() for part in step))

    def watch(self, images: Tensor) -> Seen:
        """Runs the model and keeps the guided layer's output."""
        checks.rank("images", checks.floating("images", images), "[N,3,H,W]")
        depth = self._find(images)
        if depth.module is None:
            images = images.detach().requires_grad_(torch.is_grad_enabled())
            return Seen(self._logits(self._run(images)), images, images)
        with output_of(unwrap(self.model).get_submodule(depth.module), watch=not self.closed_form) as caught:
            logits = self._logits(self._run(images))
        if len(caught) != 1:
            compiled = " (a compiled model does not tell its inner layers' outputs)" if not caught else ""
            raise ValueError(
                f"layer {depth.module!r} must run once in a forward pass, it ran {len(caught)} times{compiled}"
            )
        return Seen(logits, images, caught[0])

    def guide(self, seen: Seen, target: Tensor, boxes: Boxes, ignore: Boxes | None = None) -> Guided:
        """The guidance loss of what was seen; arguments as in a call."""
        return self._guide(seen, target, boxes, ignore, create_graph=torch.is_grad_enabled())

    def _guide(self, seen: Seen, target: Tensor, boxes: Boxes, ignore: Boxes | None, create_graph: bool) -> Guided:
        for name, given in (("boxes", boxes), ("ignore", boxes if ignore is None else ignore)):
            if not isinstance(given, Boxes):
                raise TypeError(f"{name} must be a dk.Boxes, got {type(given).__name__}")
            if len(given) != len(seen.images):
                raise ValueError(f"{name} must be of N={len(seen.images)} images, got {len(given)}")
        checks.shape("target", checks.tensor("target", target), "[N]", [len(seen.images)])
        maps = self._maps(seen, target.clamp(min=0), create_graph)
        boxes, ignore = judged(boxes, target, ignore)
        size = (seen.images.shape[2], seen.images.shape[3])
        loss = localization_loss(
            maps, boxes, kind=self.kind, size=size, normalize=True, reduction=self.reduction, ignore=ignore
        )
        return Guided(seen.logits, self.weight * loss, maps)

    def attribute(self, images: Tensor, target: Tensor) -> Tensor:
        """The maps alone, [N,h,w], or [N,T,h,w] for a target int64 [N,T]; without a graph."""
        with torch.set_grad_enabled(not self.closed_form):
            return self._maps(self.watch(images), target, create_graph=False).detach()

    # -- maps ---------------------------------------------------------------------------------------------------------

    def _find(self, images: Tensor) -> Depth:
        if self._depth is None:
            if not len(images):
                raise ValueError("images must hold at least one the first time, got none")
            self._depth = find(self.model, self.layer, images)
        return self._depth

    def _run(self, images: Tensor) -> object:
        if self.closed_form:
            return self.model(images)
        with sdpa_kernel(SDPBackend.MATH):  # no other attention kernel of PyTorch's can be differentiated twice
            return self.model(images)

    def _logits(self, logits: object) -> Tensor:
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model must give logits [N,K], got {got}")
        return logits

    def _maps(self, seen: Seen, target: Tensor, create_graph: bool) -> Tensor:
        layout = self._find(seen.images).layout
        feature = layout.to_map(seen.raw, seen.images)
        if self.closed_form is None and bool(feature.any()):  # maps of zeros would confirm whatever is asked
            self._classifiers[self.model.training] = self._confirmed_classifier(seen, feature, target)
        classifier = self._classifiers.get(self.model.training)
        if classifier is not None:
            maps = final_layer_map(feature, classifier.weight, target)
            return maps.relu() if self.attribution == "grad_cam" else maps
        if self.attribution == "bcos":
            return self._bcos(seen.images, target, create_graph)
        if self.attribution == "integrated_gradients":
            head = self._head(seen, layout)
            with statistics_kept(self.model), sdpa_kernel(SDPBackend.MATH):
                return integrated_gradients(head, feature, target, steps=self.steps, create_graph=create_graph)
        return self._by_gradient(seen, layout, target, create_graph)

    def _by_gradient(self, seen: Seen, layout: Layout, target: Tensor, create_graph: bool) -> Tensor:
        """At the raw output, which the logits were computed from; a rearranged one they were not."""
        if layout.axes == "NCHW":
            method = grad_cam if self.attribution == "grad_cam" else input_x_gradient
            return method(seen.logits, seen.raw, target, create_graph=create_graph)
        gradients, scale = scaled_gradients(seen.logits, seen.raw, target, create_graph=create_graph)
        feature = layout.to_map(seen.raw, seen.images)
        with torch.set_grad_enabled(create_graph):
            maps = [self._weigh(layout.to_map(gradient, seen.images), feature) / scale for gradient in gradients]
        return maps[0] if target.dim() == 1 else torch.stack(maps, 1)

    def _weigh(self, gradient: Tensor, feature: Tensor) -> Tensor:
        if self.attribution == "grad_cam":
            return channel_dot(gradient.mean((2, 3)), feature).relu()
        return channel_dot(gradient, feature)

    def _bcos(self, images: Tensor, target: Tensor, create_graph: bool) -> Tensor:
        inner = Guide(unwrap(self.model), self.layer, "input_x_gradient")
        inner.use_gradients()
        inner._depth = self._depth
        with explanation_mode(inner.model), statistics_kept(inner.model), torch.enable_grad():
            seen = inner.watch(images)
            return inner._maps(seen, target, create_graph)

    def _head(self, seen: Seen, layout: Layout) -> Callable[[Tensor], Tensor]:
        """From a feature map to logits: the model, with that map in the place of the layer's output."""
        model, depth = unwrap(self.model), self._find(seen.images)
        if depth.module is None:
            return lambda images: self._logits(model(images))
        layer = model.get_submodule(depth.module)

        def head(feature: Tensor) -> Tensor:
            raw = layout.from_map(feature)
            if layout.prefix:  # tokens that are no part of the map stay what they were
                raw = torch.cat([seen.raw[:, : layout.prefix], raw[:, layout.prefix :]], 1)
            handle = layer.register_forward_hook(lambda module, arguments, output: raw)
            try:
                return self._logits(model(seen.images))
            finally:
                handle.remove()

        return head

    def _confirmed_classifier(self, seen: Seen, feature: Tensor, target: Tensor) -> nn.Linear | None:
        """The linear layer whose closed form gives this batch's maps, as autograd does."""
        model: Any = unwrap(self.model)
        shape = (feature.shape[1], seen.logits.shape[1])
        found = [m for m in model.modules() if isinstance(m, nn.Linear) and (m.in_features, m.out_features) == shape]
        if not found or not seen.raw.requires_grad:
            return None
        column = target if target.dim() == 1 else target[:, 0]
        layout = self._find(seen.images).layout
        (gradient,), scale = scaled_gradients(seen.logits, seen.raw, column)
        with torch.no_grad():
            expected = (channel_dot(layout.to_map(gradient, seen.images), feature) / scale).to(feature.dtype)
            for classifier in reversed(found):
                if close(final_layer_map(feature, classifier.weight, column).to(feature.dtype), expected):
                    return classifier
        return None
