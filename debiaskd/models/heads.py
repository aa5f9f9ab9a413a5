"""Frozen heads: the teacher's layers between the input of its last layers and its logits.

A teacher is `x → z → logits`. Two levels of `z` can be transplanted:

    map     the logits follow from the last feature map alone (pooling, then whatever layers): the map is matched
    token   they do not (class token, two distilled tokens, attention pool, a hidden layer behind a named map): `z` is
            the vector that the last layers read, and the student's pooled map is matched with it

The level and the layers are not guessed from names: a head is accepted if it turns random inputs into the teacher's own
logits. The test uses a copy in which constant tensors (a new last layer of zeros, a batch norm that is still the
identity) are perturbed, so that the result depends on the structure of the teacher and not on how far it has been
trained.

Frozen tensors are buffers, not parameters. `parameters()` does not list them, so that no optimizer, weight decay or
`requires_grad_(True)` reaches them, while `state_dict`, `.to()`, `copy.deepcopy`, pickling and `torch.export` treat
them like every other tensor of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from debiaskd.models.cut import Cut, Uses, close, prune
from debiaskd.models.last_layers import Reading, checked_logits, classifiers_of, reading, readings, varied
from debiaskd.models.layouts import Layout
from debiaskd.models.modules import share

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """Turn the parameters of `module` into buffers of the same names, in place."""
    parameters = {id(parameter): parameter.detach() for parameter in module.parameters()}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, parameters[id(parameter)])
                part.__dict__.setdefault("learned_buffers", []).append(name)
    return module.eval()


def count_parameters(model: nn.Module) -> int:
    """Count the learned numbers of a deployed model, each tensor once: its parameters, the frozen tensors of a
    transplanted head, which are buffers, and other buffers that a module names in `learned_buffers` (CID's contexts).

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), freeze(nn.Linear(4, 2)))
        >>> sum(parameter.numel() for parameter in model.parameters()), count_parameters(model)
        (36, 46)
    """
    learned = list(model.parameters())
    for module in model.modules():
        learned += [getattr(module, name) for name in getattr(module, "learned_buffers", ())]
    return sum({id(tensor): tensor.numel() for tensor in learned}.values())


class Frozen(nn.Module):
    """A module that stays in eval mode when `train()` is called on a parent: no dropout, no batch norm updates."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(False)
        return self


class Head(Frozen):
    """A frozen head: a map [N,C,H,W], or at token level `z` [N,D] too, to logits [N,K].

    Attributes:
        in_features: D, the width of what the last layers read.
        num_classes: K.
    """

    in_features: int
    num_classes: int

    def get_classifier(self) -> Any:
        """The last layer; a `ModuleList` where there are several."""
        raise NotImplementedError


class LinearHead(Head):
    """Global average pooling, then the frozen linear layer: [N,C,H,W] or [N,C] → [N,K]."""

    def __init__(self, classifier: nn.Linear) -> None:
        super().__init__()
        self.fc = freeze(copy.deepcopy(classifier))
        self.in_features, self.num_classes = classifier.in_features, classifier.out_features
        self.eval()

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def forward(self, feature: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = feature.mean(dim=(2, 3)) if feature.dim() == 4 else feature
        return pooled if pre_logits else self.fc(pooled)


class LayersHead(Head):
    """The frozen last layers on pooled features [N,C,H,W] or [N,D]: `Σ a_i · layer_i(z_i)`, [N,K].

    Args:
        layers: as they run in the teacher.
        shapes: of each distinct input, without N; the inputs lie one after another in D.
        reads: for each layer, which of these inputs.
        scale: a [len(layers)].
    """

    scale: Tensor

    def __init__(self, layers: list[nn.Module], shapes: list[torch.Size], reads: list[int], scale: Tensor) -> None:
        super().__init__()
        self.layers = freeze(nn.ModuleList(copy.deepcopy(layers)))
        self.shapes, self.reads = [tuple(shape) for shape in shapes], reads
        self.widths = [shape.numel() for shape in shapes]
        self.register_buffer("scale", scale.detach().clone())
        self.in_features = sum(self.widths)
        self.eval()

    def get_classifier(self) -> Any:
        return self.layers[0] if len(self.layers) == 1 else self.layers

    def forward(self, feature: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = feature.mean(dim=(2, 3)) if feature.dim() == 4 else feature
        if pre_logits:
            return pooled
        parts = pooled.split(self.widths, dim=1)
        inputs = [p if len(shape) == 1 else p.unflatten(1, shape) for p, shape in zip(parts, self.shapes)]
        outputs = [layer(inputs[i]).flatten(1) for layer, i in zip(self.layers, self.reads)]
        if len(outputs) == 1:
            return outputs[0]  # type: ignore[no-any-return]
        return (self.scale[:, None, None] * torch.stack(outputs)).sum(0)


class MapHead(Head):
    """A frozen module that reads the map itself, such as a 1×1 convolution before pooling: [N,C,H,W] → [N,K]."""

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.layer: Any = freeze(copy.deepcopy(layer))
        self.in_features = channels
        self.eval()

    def get_classifier(self) -> Any:
        return self.layer

    def forward(self, feature: Tensor, pre_logits: bool = False) -> Tensor:
        return feature.mean(dim=(2, 3)) if pre_logits else self.layer(feature).flatten(1)


class CarriedHead(Head):
    """The teacher's own `forward_head` on the layers it needs, frozen: [N,C,H,W] → [N,K]."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.model: Any = freeze(copy.deepcopy(model))
        self.layout = layout
        self.eval()

    def get_classifier(self) -> Any:
        found = self.model.get_classifier()
        return found if isinstance(found, nn.Module) else nn.ModuleList(classifiers_of(self.model))

    def forward(self, feature: Tensor, pre_logits: bool = False) -> Tensor:
        raw = self.layout.from_map(feature)
        if pre_logits:
            pooled: Tensor = self.model.forward_head(raw, pre_logits=True)
            return pooled.flatten(1)
        logits: Tensor = self.model.forward_head(raw)
        return logits


Make = Callable[[Any], Head]


def map_head(cut: Cut, name: str | None = None) -> Head | None:
    """The head that acts on the feature map of the model that was cut; None if its logits read more than that.

    Args:
        cut: a teacher.
        name: of its last layer; None: found.

    Raises:
        TypeError, ValueError: see `readings`; no logits [N,K].
    """
    twin: Any = varied(cut.model)
    noise = torch.randn(cut.raw.shape, generator=torch.Generator().manual_seed(1)).to(cut.raw)
    found = readings(cut.role, twin, cut.images, name)
    with torch.no_grad():
        expected = _logits(cut, twin, noise)
        checked_logits(cut.role, expected)
        feature = cut.body.layout.to_map(noise, cut.images)
        for make in _map_heads(cut, found, noise):
            try:
                same = close(make(twin)(feature.clone()), expected)
            except Exception:  # a layer that this map does not fit fails in whatever way it likes
                continue
            if same:
                head = make(share(cut.model).eval())
                head.num_classes = expected.shape[1]
                return _measured(head, feature)
    return None


def _map_heads(cut: Cut, found: list[Reading], noise: Tensor) -> Iterator[Make]:
    """From the simplest: pooling and a linear layer, the protocol's own head, the layers that end in the logits."""
    single = [r for r in found if len(r.names) == 1 and r.scale is None]
    for r in single:
        if r.kind is nn.Linear and r.widths == [cut.channels]:
            yield lambda model, r=r: LinearHead(model.get_submodule(r.names[0]))  # type: ignore[misc]
    if cut.body.layer is None:
        yield lambda model: _carried(cut, model, noise)
    for r in single:
        if r.shapes[0][1:].numel() == 1 and r.widths == [cut.channels]:
            yield lambda model, r=r: LayersHead([model.get_submodule(r.names[0])], r.shapes, [0], torch.ones(1))  # type: ignore[misc]
        elif len(r.shapes[0]) == 3 and r.shapes[0][0] == cut.channels:
            yield lambda model, r=r: MapHead(model.get_submodule(r.names[0]), cut.channels)  # type: ignore[misc]


def token_head(role: str, model: nn.Module, images: Tensor, name: str | None = None) -> tuple[Head, list[str]]:
    """The head on what the last layers read, and the names of the layers whose inputs that is, each once.

    Args:
        role: of the model, in messages.
        model: any module from images to logits [N,K].
        images: one that it runs on.
        name: of its last layer; None: found.

    Raises:
        TypeError, ValueError: see `readings`; no layers are found whose outputs make the logits.
    """
    twin: Any = varied(model)
    generator = torch.Generator().manual_seed(2)
    batch = torch.randn(3, *images.shape[1:], generator=generator).to(images)
    found = readings(role, twin, batch, name)
    with torch.no_grad():
        for r in reversed(found):  # a hidden layer's width rather than that of a whole map
            head = _token_head(twin, r, batch, twin)
            if head is not None:
                made = _token_head(share(model).eval(), r, batch, None)
                assert made is not None
                return made, r.distinct
    if name is not None:
        raise ValueError(f"head must name a layer of the {role} whose outputs are its logits [N,K], got {name!r}")
    raise ValueError(
        f"{role} must end in layers whose outputs are its logits, or add up to them, and that read one vector an "
        f"image; in {type(model).__name__} none were found: name its last layer (head), or give it timm's "
        "forward_features, forward_head and get_classifier"
    )


def _token_head(model: Any, r: Reading, batch: Tensor, twin: Any) -> Head | None:
    if any(len(shape) > 2 and shape[1:].numel() > 1 for shape in r.shapes):
        return None  # a whole map, or all tokens
    z, outputs, logits = reading(model, r, batch)
    layers = [model.get_submodule(name) for name in r.names]
    if r.kind is nn.Linear and len(layers) == 1 and len(r.shapes[0]) == 1:
        head: Head = LinearHead(layers[0])
    else:
        head = LayersHead(layers, r.distinct_shapes, r.reads, r.scale_for(outputs, logits))
    head.num_classes = logits.shape[1]
    if twin is not None:
        # Other images than those that a sum's factors were found on.
        z, _, logits = reading(model, r, batch.flip(-1) * 0.7)
        if not close(head(z), logits):
            return None
    return head


def _measured(head: Head, feature: Tensor) -> Head:
    if isinstance(head, CarriedHead):
        head.in_features = head(feature.clone(), pre_logits=True).shape[1]
    return head


def _logits(cut: Cut, model: Any, raw: Tensor) -> Any:
    """What the whole model answers when its last features are `raw`; code behind the layer may change `raw`."""
    if cut.body.layer is None:
        return model.forward_head(raw.clone())
    handle = model.get_submodule(cut.body.layer).register_forward_hook(lambda module, arguments, output: raw)
    try:
        return model(cut.images)
    finally:
        handle.remove()


def _carried(cut: Cut, model: Any, raw: Tensor) -> CarriedHead:
    model = share(model).eval()
    uses = Uses()
    with uses:
        model.forward_head(raw.clone())
    prune(model, uses.seen)
    return CarriedHead(model, cut.body.layout)
