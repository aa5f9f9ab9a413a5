"""One pass of a model that gives its last feature map, what its last layer reads, and its logits.

Any model will do: the two places are found on a small run, and looked at while the model runs as ever. Nothing is
computed twice, and nothing that is not asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.depths import find
from debiaskd.features import Layout, named_module, share
from debiaskd.guide import Guide, Seen
from debiaskd.terms import Outputs


@dataclass(frozen=True)
class Places:
    """Where a model's last feature map comes from, and its last linear layer: names of modules."""

    feature: str
    layout: Layout
    classifier: str
    width: int
    pooled_width: int


def places(model: nn.Module, images: Tensor, layer: str | None = None, head: str | None = None) -> Places:
    """Finds them.

    Args:
        model: from images to logits [N,K].
        images: [N,3,H,W] that it runs on.
        layer, head: names, where they are known.

    Raises:
        ValueError: not found, or no such module.
    """
    depth = find(model, layer or "Final", images)
    assert depth.module is not None
    copied: Any = share(model).eval()
    caught: dict[str, Any] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            caught[name] = output

        return hook

    linear = {name: module for name, module in copied.named_modules() if isinstance(module, nn.Linear)}
    for name, module in linear.items():
        module.register_forward_hook(note(name))
    copied.get_submodule(depth.module).register_forward_hook(note("feature"))
    with torch.no_grad():
        logits = copied(images[:1].detach())
    feature = depth.layout.to_map(caught.pop("feature"), images[:1])
    if head is not None:
        if not isinstance(named_module("head", "model", model, head), nn.Linear):
            raise ValueError(f"head must name an nn.Linear of the model, got {head!r}")
    else:
        found = [name for name, output in caught.items() if output is logits]
        # A model that changes its logits after its last layer still has one; the last that ran.
        head = found[-1] if found else next(reversed(caught), None)
        if head is None:
            raise ValueError(f"model must end in an nn.Linear, got {type(model).__name__} without one that runs")
    return Places(depth.module, depth.layout, head, feature.shape[1], linear[head].in_features)


class Watched(nn.Module):
    """`model`, looked at while it runs. Under torch.compile the looking is compiled with it.

    Args:
        model: see `places`.
        at: what `places` found; None where nothing is wanted.
        wanted: any of "feature" and "pooled": what is kept beside the logits.
    """

    def __init__(self, model: nn.Module, at: Places | None, wanted: Iterable[str]) -> None:
        super().__init__()
        self.model, self.at = model, at
        self.caught: dict[str, Tensor] = {}
        self.looking = False  # nothing is held on to when others run the model
        if at is None:
            return
        if "feature" in wanted:
            model.get_submodule(at.feature).register_forward_hook(self._catch_feature)
        if "pooled" in wanted:
            model.get_submodule(at.classifier).register_forward_pre_hook(self._catch_pooled)

    def _catch_feature(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        if self.looking:
            self.caught["feature"] = output

    def _catch_pooled(self, module: nn.Module, arguments: Any) -> None:
        if self.looking:
            self.caught["pooled"] = arguments[0]

    def forward(self, images: Tensor, guide: Guide | None = None) -> tuple[Outputs, Seen | None]:
        """What the model gives; with a guide, of the same model, what that watches in the same pass."""
        self.looking = True
        try:
            seen = guide.watch(images) if guide is not None else None
            logits = seen.logits if seen is not None else self.model(images)
        finally:
            self.looking = False
        feature, pooled = self.caught.pop("feature", None), self.caught.pop("pooled", None)
        if feature is not None and self.at is not None:
            feature = self.at.layout.to_map(feature, images)
        return Outputs(feature, pooled, logits), seen
