"""Extract the last feature map, the pooled features and the logits of a model in one forward pass.

Works for any model: a trial run finds the two layers, and hooks record them during the normal forward pass. Nothing is
computed twice, and only what was requested is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from debiaskd.attribution.attributor import Attributor, Seen
from debiaskd.models.depths import find
from debiaskd.models.last_layers import last_layers
from debiaskd.models.layouts import Layout
from debiaskd.models.modules import share
from debiaskd.models.transplant import Transplanted
from debiaskd.terms import Outputs
from debiaskd.training.batches import SplitLoader


@dataclass(frozen=True)
class FeatureLayers:
    """Names of the layers that give a model's last feature map and read its pooled features.

    feature: "" where it was not asked for; `width` of its channels.
    readers: the layers whose inputs are the pooled features, one after another; `pooled_width` of all of them.
    classifier: the last layer, if it is one.
    """

    feature: str
    layout: Layout
    readers: tuple[str, ...]
    width: int
    pooled_width: int

    @property
    def classifier(self) -> str:
        if len(self.readers) != 1:
            raise ValueError(f"model must end in one layer, it ends in {list(self.readers)}")
        return self.readers[0]


def find_feature_layers(
    model: nn.Module,
    images: Tensor,
    layer: str | None = None,
    head: str | None = None,
    wanted: Iterable[str] = ("feature", "pooled"),
) -> FeatureLayers:
    """Find the layers that `FeatureExtractor` records.

    Args:
        model: from images to logits [N,K].
        images: [N,3,H,W] that it runs on.
        layer, head: names, where they are known; of a transplanted student those of its own network, which has another
            last map and head now.
        wanted: any of "feature" and "pooled": nothing else is looked for.

    Raises:
        ValueError: not found, or no such module.
    """
    if isinstance(model, Transplanted):
        layer = head = None  # names of the network inside; the map and the head of the whole are known
    feature, layout, width = "", Layout(), 0
    if "feature" in wanted:
        depth = find(model, layer or "Final", images)
        assert depth.module is not None
        feature, layout = depth.module, depth.layout
        width = layout.to_map(_output(model, feature, images[:1].detach()), images[:1]).shape[1]
    if "pooled" not in wanted:
        return FeatureLayers(feature, layout, (), width, 0)
    found = last_layers("model", share(model).eval(), images[:1].detach(), head)
    return FeatureLayers(
        feature, layout, tuple(found.distinct), width, sum(shape.numel() for shape in found.distinct_shapes)
    )


def _output(model: nn.Module, name: str, images: Tensor) -> Tensor:
    copied, caught = share(model).eval(), []
    copied.get_submodule(name).register_forward_hook(lambda module, arguments, output: caught.append(output))
    with torch.no_grad():
        copied(images)
    found: Tensor = caught[0]
    return found


class FeatureExtractor(nn.Module):
    """Wrap `model` and record its features during the forward pass. torch.compile compiles the hooks with it.

    Args:
        model: see `find_feature_layers`.
        at: the result of `find_feature_layers`; None where nothing is wanted.
        wanted: any of "feature" and "pooled": what is recorded besides the logits.
    """

    def __init__(self, model: nn.Module, at: FeatureLayers | None, wanted: Iterable[str]) -> None:
        super().__init__()
        self.model, self.at = model, at
        self.caught: dict[str, Tensor] = {}
        self.read: list[Tensor] = []
        self.recording = False  # nothing is stored when others run the model
        if at is None:
            return
        if "feature" in wanted:
            model.get_submodule(at.feature).register_forward_hook(self._catch_feature)
        if "pooled" in wanted:
            for name in at.readers:
                model.get_submodule(name).register_forward_pre_hook(self._catch_pooled)

    def _catch_feature(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        if self.recording:
            self.caught["feature"] = output

    def _catch_pooled(self, module: nn.Module, arguments: Any) -> None:
        if self.recording:
            self.read.append(arguments[0])

    def forward(self, images: Tensor, guide: Attributor | None = None) -> tuple[Outputs, Seen | None]:
        """Run the model; with a guide on the same model, also return what the guide records in the same pass."""
        self.recording = True
        try:
            seen = guide.watch(images) if guide is not None else None
            logits = seen.logits if seen is not None else self.model(images)
        finally:
            self.recording = False
        if not isinstance(logits, Tensor):
            raise TypeError(f"model must give logits [N,K], got {type(logits).__name__}")
        feature = self.caught.pop("feature", None)
        pooled = torch.cat([part.flatten(1) for part in self.read], 1) if self.read else None
        self.read.clear()
        if feature is not None and self.at is not None:
            feature = self.at.layout.to_map(feature, images)
        return Outputs(feature, pooled, logits), seen


class Reading(NamedTuple):
    """What a model makes of the N images of a split: logits [N,K] and pooled features [N,D], float32 on the CPU."""

    logits: Tensor
    pooled: Tensor


def iterate_outputs(
    model: nn.Module,
    at: FeatureLayers | None,
    loader: SplitLoader,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[Outputs]:
    """Run a model over all images of a split in order and yield what it gives for each batch; arguments as
    `read_outputs`, or None for `at` where the logits alone are wanted."""
    extractor = FeatureExtractor(model, at, () if at is None else ("pooled",)).eval()
    for batch in loader.dataloader:
        with torch.no_grad(), autocast():
            outputs, _ = extractor(loader.transform(batch).images)
        yield outputs


def read_outputs(
    model: nn.Module,
    at: FeatureLayers,
    loader: SplitLoader,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Reading:
    """Run a model over all images of a split, in order.

    Args:
        model: on the images' device; is put into evaluation mode. Its hooks stay registered.
        at: where its pooled features are, of `find_feature_layers`.
        loader: not augmented, and all of the images for this process.
        autocast: makes the context that the model runs in.
    """
    logits, pooled = [], []
    for outputs in iterate_outputs(model, at, loader, autocast):
        assert outputs.pooled is not None
        logits.append(outputs.logits.float().cpu())
        pooled.append(outputs.pooled.float().cpu())
    return Reading(torch.cat(logits), torch.cat(pooled))
