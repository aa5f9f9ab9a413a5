"""Attribution maps of a model at one of its layers, with a graph to train through where that is asked for.

At the last feature map behind global pooling and a linear head the attribution has a closed form (`maps.py`): no
backward pass for it and no second-order graph. Whether that holds for a model is read from its autograd graph
(`closed_form.py`). Everywhere else the gradient is computed down to the chosen layer, no further, and the batch's
normalization statistics are held constant (`debiaskd.models.batch_statistics`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from debiaskd.attribution.closed_form import LinearCalls, pooled_linear
from debiaskd.attribution.gradients import scaled_gradients
from debiaskd.attribution.maps import explanation_mode, final_layer_map, integrated_gradients
from debiaskd.models.batch_statistics import Statistics, constant_statistics
from debiaskd.models.constant_gradient import attribution_gradient
from debiaskd.models.depths import Depth, check_layer, find
from debiaskd.models.layouts import Layout
from debiaskd.models.wrappers import as_read, output_of, statistics_kept, unwrap
from debiaskd.ops.channel_dot import channel_dot
from debiaskd.utils import checks

ATTRIBUTIONS = ("input_x_gradient", "grad_cam", "bcos", "integrated_gradients")
STATISTICS = ("constant", "own")


class Seen(NamedTuple):
    """A model's answer to a batch, and its feature map as the model lays it out.

    `scores` are the logits as the model itself gave them, inside of what wraps it; `statistics` those that it
    normalized by; `calls` of its linear layers are kept until the closed form is decided.
    """

    logits: Tensor
    images: Tensor
    raw: Tensor
    scores: Tensor
    statistics: Statistics | None = None
    calls: LinearCalls | None = None


class Attributor:
    """Compute a model's attribution maps at a layer.

    Args:
        model, layer, attribution, steps, statistics: as for `debiaskd.attribution.guide.Guide`.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str = "Final",
        attribution: str = "input_x_gradient",
        *,
        steps: int = 32,
        statistics: str = "constant",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_layer(model, layer)
        checks.option("attribution", attribution, ATTRIBUTIONS)
        checks.option("statistics", statistics, STATISTICS)
        if checks.integer("steps", steps) < 1:
            raise ValueError(f"steps must be an integer >= 1, got {steps}")
        if attribution == "bcos":
            with explanation_mode(model):  # raises if there are no such layers
                pass
        self.model, self.layer, self.attribution = model, layer, attribution
        self.steps, self.statistics = steps, statistics
        self._depth: Depth | None = None
        #: Names of the linear layers; training and evaluation are decided separately, since dropout differs.
        self._classifiers: dict[bool, str | None] = {}
        self._independent: set[bool] = set()
        if layer == "Input" or attribution == "bcos":
            self.use_gradients()

    @property
    def closed_form(self) -> bool | None:
        """Whether the closed form is used in the current mode of the model; None before the first batch."""
        mode = self.model.training
        return self._classifiers[mode] is not None if mode in self._classifiers else None

    def use_gradients(self) -> None:
        """Disable the closed form."""
        self._classifiers = {False: None, True: None}

    def state_dict(self) -> dict[str, Any]:
        """Return the decisions made so far: the name of the guided module, and the closed form's layer by mode."""
        depth = self._depth
        layout = Layout() if depth is None else depth.layout
        grid = [] if layout.grid is None else [layout.grid]
        found = None if depth is None else [depth.module, layout.axes, layout.prefix, layout.stride, *grid]
        modes = (("training", True), ("evaluation", False))
        return {"depth": found, "closed_form": {n: self._classifiers[m] for n, m in modes if m in self._classifiers}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as decided.

        Raises:
            ValueError: the model has no such layers.
        """
        depth, classifiers = state["depth"], state["closed_form"]
        names = {name for name, _ in unwrap(self.model).named_modules()}
        for name in (None if depth is None else depth[0], *classifiers.values()):
            if name is not None and name not in names:
                raise ValueError(f"state must be of this guide's model, got one that has a layer {name!r}")
        self._depth = None if depth is None else Depth(depth[0], Layout(*depth[1:]))
        modes = {"training": True, "evaluation": False}
        self._classifiers = {modes[mode]: name for mode, name in classifiers.items()}

    def watch(self, images: Tensor) -> Seen:
        """Run the model and keep the guided layer's output."""
        checks.rank("images", checks.floating("images", images), "[N,3,H,W]")
        images = outside_inference_mode(images)
        depth = self._find(images)
        if depth.module is None:
            images = images.detach().requires_grad_(torch.is_grad_enabled())
        model, keep = unwrap(self.model), self.attribution == "integrated_gradients" and not self.closed_form
        statistics = Statistics() if keep and self.statistics == "constant" else None
        calls = LinearCalls() if self.closed_form is None and torch.is_grad_enabled() else None
        with ExitStack() as stack:
            caught = [images]
            if depth.module is not None:
                layer = model.get_submodule(depth.module)
                caught = stack.enter_context(output_of(layer, watch=not self.closed_form))
            inner = [] if model is self.model else stack.enter_context(output_of(model, watch=False))
            if calls is not None:
                stack.enter_context(calls.of(model))
            explained = caught if self.statistics == "constant" else None
            logits = self._logits(self._run(self.model, images, record=statistics, explained=explained))
        if len(caught) != 1:
            raise ValueError(f"layer {depth.module!r} must run once in a forward pass, it ran {len(caught)} times")
        scores = self._logits(inner[-1]) if inner else logits
        return Seen(logits, images, caught[0], scores, statistics, calls)

    def attribute(self, images: Tensor, target: Tensor) -> Tensor:
        """Return maps only, [N,h,w], or [N,T,h,w] for a target int64 [N,T], without a graph."""
        with self._gradients(not self.closed_form):
            return self._maps(self.watch(images), outside_inference_mode(target), create_graph=False).detach()

    @contextmanager
    def _gradients(self, wanted: bool) -> Iterator[None]:
        """Gradients or none within, in torch.inference_mode, too."""
        if not torch.is_inference_mode_enabled():
            with torch.set_grad_enabled(wanted):
                yield
            return
        if any(parameter.is_inference() for parameter in self.model.parameters()):
            raise ValueError("model must be made outside of torch.inference_mode, which lets it have no gradients")
        with torch.inference_mode(False), torch.set_grad_enabled(wanted):
            yield

    def _find(self, images: Tensor) -> Depth:
        if self._depth is None:
            if not len(images):
                raise ValueError("images must hold at least one the first time, got none")
            product = self.attribution in ("input_x_gradient", "integrated_gradients")
            self._depth = find(self.model, self.layer, images, reaching=True, product=product)
        return self._depth

    def _run(
        self,
        model: nn.Module,
        images: Tensor,
        record: Statistics | None = None,
        replay: Iterator[tuple[Tensor, ...]] | None = None,
        explained: list[Tensor] | None = None,
    ) -> object:
        with ExitStack() as stack:
            if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules()):
                # A compiled model cannot be differentiated twice, and hides the outputs of its inner layers.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if not self.closed_form:
                held = constant_statistics(unwrap(model), record=record, replay=replay, explained=explained)
                stack.enter_context(held)
            return model(images)

    def _logits(self, logits: object) -> Tensor:
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model must give logits [N,K], got {got}")
        return logits

    def _maps(self, seen: Seen, target: Tensor, create_graph: bool) -> Tensor:
        layout = self._find(seen.images).layout
        feature = layout.to_map(seen.raw, seen.images)
        if self.closed_form is None and seen.calls is not None:
            found = pooled_linear(seen.calls, seen.scores, seen.raw, lambda raw: layout.to_map(raw, seen.images))
            self._classifiers[self.model.training] = found
        classifier = self._classifiers.get(self.model.training)
        if classifier is not None:
            weight: Any = unwrap(self.model).get_submodule(classifier).weight
            maps = final_layer_map(feature, weight, target)
            return maps.relu() if self.attribution == "grad_cam" else maps
        if self.attribution == "bcos":
            return self._bcos(seen.images, target, create_graph)
        if self.attribution == "integrated_gradients":
            return self._by_path(seen, layout, feature, target, create_graph)
        return self._by_gradient(seen, layout, target, create_graph)

    def _by_gradient(self, seen: Seen, layout: Layout, target: Tensor, create_graph: bool) -> Tensor:
        """At the raw output, which the logits were computed from; a rearranged one they were not."""
        self._check_independence(seen)
        gradients, scale = scaled_gradients(
            seen.scores, seen.raw, target, create_graph=create_graph, alone=self.statistics == "own"
        )
        feature = layout.to_map(seen.raw, seen.images)
        if self._find(seen.images).module is None:
            feature = feature.detach()  # nobody asks for the gradient of the images
        with torch.set_grad_enabled(create_graph):
            maps = [self._weigh(layout.to_map(gradient, seen.images), feature) / scale for gradient in gradients]
        return maps[0] if target.dim() == 1 else torch.stack(maps, 1)

    def _weigh(self, gradient: Tensor, feature: Tensor) -> Tensor:
        if self.attribution == "grad_cam":
            return channel_dot(gradient.mean((2, 3)), feature).relu()
        return channel_dot(gradient, feature)

    def _check_independence(self, seen: Seen) -> None:
        """Once in each mode, on a batch: no image's logits may depend on another image but through known statistics."""
        mode = self.model.training
        if mode in self._independent or self.statistics == "own" or len(seen.images) < 2:
            return
        first = torch.zeros_like(seen.scores)
        first[0] = torch.linspace(1, 2, first.shape[1])
        gradient = attribution_gradient(seen.scores, seen.raw, first, create_graph=False)
        if gradient is not None:
            own, others = gradient[:1].abs().max(), gradient[1:].abs().max()
            if bool(others > 1e-3 * own):
                raise ValueError(
                    f"model must treat the images of a batch apart, but for the statistics of batch norm, and "
                    f"{type(unwrap(self.model)).__name__} does not: the gradient of one image's logits at another "
                    f'image is {float(others / own):.2g} of that at its own; statistics="own" allows for that'
                )
        self._independent.add(mode)

    def _by_path(self, seen: Seen, layout: Layout, feature: Tensor, target: Tensor, create_graph: bool) -> Tensor:
        def path(head: Callable[[Tensor], Tensor], feature: Tensor, target: Tensor) -> Tensor:
            alone = self.statistics == "own"
            return integrated_gradients(head, feature, target, steps=self.steps, create_graph=create_graph, alone=alone)

        with statistics_kept(self.model):
            if self.statistics == "constant":
                return path(self._head(seen, layout, detach=not create_graph), feature, target)
            head = self._head(seen, layout, detach=False)
            maps = []
            for i in range(len(feature)):  # one image moves along its path, the others do not change

                def alone(point: Tensor, i: int = i) -> Tensor:
                    return head(torch.cat([feature[:i], point, feature[i + 1 :]]))[i : i + 1]

                maps.append(path(alone, feature[i : i + 1], target[i : i + 1]))
            return torch.cat(maps)

    def _bcos(self, images: Tensor, target: Tensor, create_graph: bool) -> Tensor:
        inner = Attributor(unwrap(self.model), self.layer, "input_x_gradient", statistics=self.statistics)
        inner.use_gradients()
        inner._depth, inner._independent = self._depth, self._independent
        with explanation_mode(inner.model), statistics_kept(inner.model), torch.enable_grad():
            seen = inner.watch(as_read(inner.model, images))
            return inner._maps(seen, target, create_graph)

    def _head(self, seen: Seen, layout: Layout, detach: bool) -> Callable[[Tensor], Tensor]:
        """From a feature map to logits: the model, with that map in the place of the layer's output."""
        model, depth = unwrap(self.model), self._find(seen.images)
        layer = None if depth.module is None else model.get_submodule(depth.module)

        def run(images: Tensor) -> Tensor:
            replay = None if seen.statistics is None else seen.statistics.replay(detach=detach)
            return self._logits(self._run(model, as_read(model, images), replay=replay))

        def head(feature: Tensor) -> Tensor:
            if layer is None:
                return run(feature)
            raw = layout.from_map(feature)
            if layout.prefix:  # tokens outside the map are unchanged
                raw = torch.cat([seen.raw[:, : layout.prefix], raw[:, layout.prefix :]], 1)
            handle = layer.register_forward_hook(lambda module, arguments, output: raw)
            try:
                return run(seen.images)
            finally:
                handle.remove()

        return head


def outside_inference_mode(tensor: Tensor) -> Tensor:
    """What torch.inference_mode made can be part of no graph; a copy can."""
    return tensor.clone() if isinstance(tensor, Tensor) and tensor.is_inference() else tensor
