"""Frozen heads: what a teacher does between its last feature map and its logits.

Most teachers pool globally and apply one linear layer: `LinearHead`. Some do more behind the pooling (ConvNeXt's
norm, MobileNetV3's second convolution): `CarriedHead` holds those layers too. Which of them a teacher needs is not
guessed from names: a head is accepted when it turns random feature maps into the teacher's own logits.

Frozen tensors are buffers, not parameters. `parameters()` does not list them, so that no optimiser, weight decay or
`requires_grad_(True)` reaches them, while `state_dict`, `.to()`, `copy.deepcopy`, pickling and `torch.export` treat
them like every other tensor of the model.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from debiaskd.features import Cut, Layout, Uses, close, named_module, prune, share

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """Turn the parameters of `module` into buffers of the same names, in place."""
    parameters = {id(parameter): parameter.detach() for parameter in module.parameters()}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, parameters[id(parameter)])
    return module.eval()


class Frozen(nn.Module):
    """Stays in eval mode, whatever the module around it is told: no dropout, no batch norm that moves."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(False)
        return self


class LinearHead(Frozen):
    """Global average pooling, then the frozen linear layer: [N,C,H,W] → [N,K]."""

    def __init__(self, classifier: nn.Linear) -> None:
        super().__init__()
        self.fc = freeze(copy.deepcopy(classifier))
        self.eval()

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def forward(self, feature: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = feature.mean(dim=(2, 3))
        return pooled if pre_logits else self.fc(pooled)


class CarriedHead(Frozen):
    """The teacher's own `forward_head` on the layers it needs, frozen: [N,C,H,W] → [N,K]."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.model: Any = freeze(copy.deepcopy(model))
        self.layout = layout
        self.eval()

    def get_classifier(self) -> nn.Linear:
        classifier: nn.Linear = self.model.get_classifier()
        return classifier

    def forward(self, feature: Tensor, pre_logits: bool = False) -> Tensor:
        raw = self.layout.from_map(feature)
        output: Tensor = self.model.forward_head(raw, pre_logits=True) if pre_logits else self.model.forward_head(raw)
        return output


def head_of(cut: Cut, name: str | None = None) -> LinearHead | CarriedHead:
    """The frozen head of the model that was cut; `name` is its last linear layer (None: `get_classifier()`).

    Raises:
        TypeError: the last layer is not an `nn.Linear`.
        ValueError: no last layer is known, or the logits depend on more than the feature map and these layers.
    """
    model: Any = share(cut.model).eval()
    classifier = _classifier(cut.role, model, name)
    noise = torch.randn(cut.raw.shape, generator=torch.Generator().manual_seed(1)).to(cut.raw)
    with torch.no_grad():
        expected = _logits(cut, model, noise)
        if not isinstance(expected, Tensor) or expected.dim() != 2:
            got = list(expected.shape) if isinstance(expected, Tensor) else type(expected).__name__
            raise ValueError(f"{cut.role} must give logits [N,K], got {got}")
        feature = cut.body.layout.to_map(noise, cut.images)
        if classifier.in_features == cut.channels:
            linear = LinearHead(classifier)
            if close(linear(feature), expected):
                return linear
        carried = _carried(cut, noise) if cut.body.layer is None else None
        if carried is not None and close(carried(feature.clone()), expected):
            return carried
    raise ValueError(_refusal(cut, classifier))


def _classifier(role: str, model: nn.Module, name: str | None) -> nn.Linear:
    if name is not None:
        classifier: Any = named_module("head", role, model, name)
    else:
        get_classifier: Any = getattr(model, "get_classifier", None)
        if not callable(get_classifier):
            raise ValueError(f"head must name the {role}'s last linear layer, got None")
        classifier = get_classifier()
    if not isinstance(classifier, nn.Linear):
        what = "get_classifier()" if name is None else repr(name)
        raise TypeError(f"head must be an nn.Linear, got {type(classifier).__name__} from the {role}'s {what}")
    return classifier


def _logits(cut: Cut, model: Any, raw: Tensor) -> Any:
    """What the whole model answers when its last features are `raw`; code behind the layer may change `raw`."""
    if cut.body.layer is None:
        return model.forward_head(raw.clone())
    handle = model.get_submodule(cut.body.layer).register_forward_hook(lambda module, arguments, output: raw)
    try:
        return model(cut.images)
    finally:
        handle.remove()


def _carried(cut: Cut, raw: Tensor) -> CarriedHead:
    model: Any = share(cut.model).eval()
    uses = Uses()
    with uses:
        model.forward_head(raw.clone())
    prune(model, uses.seen)
    return CarriedHead(model, cut.body.layout)


def _refusal(cut: Cut, classifier: nn.Linear) -> str:
    if cut.body.layer is None:
        return (
            f"{cut.role} must compute its logits from its last feature map alone, but its forward_head reads more "
            "(a class token, say): build it with average pooling, such as timm's global_pool='avg'"
        )
    return (
        f"head of the {cut.role} must act on the globally averaged output of layer {cut.body.layer!r}, "
        f"[N,{cut.channels}] → logits; here {classifier.in_features} inputs are expected, or something else lies "
        "between (a norm, an activation, a hidden layer): name another layer, or give the "
        f"{cut.role} timm's forward_features, forward_head and get_classifier, which are carried whole"
    )
