"""Model guidance: train a model's attributions to lie inside object boxes (Rao et al. 2023).

    L = L_cls + weight · L_loc(attribution of one class per image, boxes of that class)

`attributor.py` computes the attribution; the loss is that of `debiaskd.ops.localization`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from debiaskd.attribution.attributor import Attributor, Seen, outside_inference_mode
from debiaskd.boxes import Boxes
from debiaskd.ops.ignore import judged
from debiaskd.ops.localization import KINDS, localization_loss
from debiaskd.utils import checks


class Guided(NamedTuple):
    """What a guided step gives.

    logits: [N,K], for the loss of the task.
    loss: scalar, to be added to it; includes the guide's weight.
    attribution: [N,h,w] raw map of the layer's size, as used in the loss.
    """

    logits: Tensor
    loss: Tensor
    attribution: Tensor


class Guide(Attributor):
    """Compute a model's logits together with a guidance loss that moves its attributions into boxes.

    Args:
        model: any module from images [N,3,H,W] to logits [N,K]; also inside DistributedDataParallel. It is not copied.
        layer: "Input", "Mid1", "Mid2", "Mid3", "Final", or the name of a module whose output is a feature map
            [N,C,H,W], [N,H,W,C] or a grid of tokens [N,L,C].
        attribution: "input_x_gradient", "grad_cam", "bcos" or "integrated_gradients".
        loss: "energy", "l1", "ppce" or "rrr", as `dk.localization_loss`.
        weight: weight of the localization loss, λ ≥ 0.
        reduction: "mean" over annotated images, or "sum", as the public code of the paper has it.
        steps: number of steps of integrated gradients.
        statistics: "constant": an image's map is the gradient of its own logit with the batch's normalization
            statistics held constant. "own": the gradient also flows through the statistics, with one backward pass per
            image, as in the public code of the paper; a slow reference, from which the first differs by O(1/N).

    B-cos and integrated gradients run the model again without updating batch norm's statistics; dropout then draws new
    numbers.

    Raises:
        TypeError, ValueError: invalid arguments, no such layer; with the first batch, a layer whose input × gradient is
            0 everywhere.

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
        statistics: str = "constant",
    ) -> None:
        super().__init__(model, layer, attribution, steps=steps, statistics=statistics)
        checks.option("loss", loss, tuple(KINDS))
        checks.option("reduction", reduction, ("mean", "sum"))
        self.kind, self.weight, self.reduction = loss, checks.number("weight", weight, minimum=0), reduction

    def __call__(self, images: Tensor, target: Tensor, boxes: Boxes, ignore: Boxes | None = None) -> Guided:
        """Run the model once and return its logits together with the guidance loss.

        Args:
            images: [N,3,H,W].
            target: int64 [N], the class to guide in each image; -1 for none (`attribution.draw_target`).
            boxes: of N images, in pixels of the images. With labels, those of the target's class count; an annotated
                image whose target has no box has an empty mask. Images that are not annotated contribute nothing.
            ignore: areas whose pixels count neither as inside nor as outside, as in `dk.localization_loss`; with
                labels, those of the target's class count. Images with only such areas of their target contribute
                nothing.
        """
        wanted = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        with self._gradients(wanted or not self.closed_form):  # a gradient makes the map, wanted or not
            step = self._guide(self.watch(images), outside_inference_mode(target), boxes, ignore, create_graph=wanted)
        return step if wanted else Guided(*(part.detach() for part in step))

    def guide(self, seen: Seen, target: Tensor, boxes: Boxes, ignore: Boxes | None = None) -> Guided:
        """Compute the guidance loss from the result of `watch`; arguments as in a call."""
        return self._guide(seen, target, boxes, ignore, create_graph=torch.is_grad_enabled())

    def _guide(self, seen: Seen, target: Tensor, boxes: Boxes, ignore: Boxes | None, create_graph: bool) -> Guided:
        for name, given in (("boxes", boxes), ("ignore", boxes if ignore is None else ignore)):
            if not isinstance(given, Boxes):
                raise TypeError(f"{name} must be a dk.Boxes, got {type(given).__name__}")
            if len(given) != len(seen.images):
                raise ValueError(f"{name} must be of N={len(seen.images)} images, got {len(given)}")
        checks.shape("target", checks.tensor("target", target), "[N]", [len(seen.images)])
        maps = self._maps(seen, target.clamp(min=0), create_graph)
        size = (seen.images.shape[2], seen.images.shape[3])
        if maps.shape[1:] == (1, 1) and self.kind != "rrr":
            raise ValueError(
                f"layer must give a map of several positions, got {self.layer!r}, whose map is 1×1 for images of "
                f"{size[0]}×{size[1]}: its share in the boxes is the same wherever the model looks; name an earlier "
                "layer, or give larger images"
            )
        boxes, ignore = judged(boxes, target, ignore)
        loss = localization_loss(
            maps, boxes, kind=self.kind, size=size, normalize=True, reduction=self.reduction, ignore=ignore
        )
        return Guided(seen.logits, self.weight * loss + self._sink(seen), maps)

    def _sink(self, seen: Seen) -> Tensor | float:
        """DistributedDataParallel with static_graph begins to average gradients where its own output gets one."""
        if getattr(self.model, "static_graph", False) and seen.logits.requires_grad:
            return 0.0 * seen.logits.sum()
        return 0.0
