"""B-cos networks of the `bcos` package, with the layers of its configurations."""

from __future__ import annotations

import math
import re
import warnings

from torch import nn

from debiaskd.models.weight_reading import NetworkError


def build_bcos(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    from bcos import models

    found: nn.Module | None = None
    if re.fullmatch(r"vgg\d+(_bnu)?", name):
        found = _bcos_vgg(name, num_classes)
    elif re.fullmatch(r"(vitc|simple_vit)_\w+", name):
        found = _bcos_vit(name, num_classes)
    else:
        for module in ("resnet", "densenet", "convnext"):
            make = getattr(getattr(models, module), name, None)
            if found is None and callable(make):
                found = make(num_classes=num_classes)
    if found is None:
        raise NetworkError(f"bcos/{name}: the bcos package has no such network")
    if pretrained:
        _load_bcos(found, name)
    return found


def _bcos_vgg(name: str, num_classes: int) -> nn.Module | None:
    """With the layers that its authors' configurations give it; its own defaults are incomplete."""
    from bcos.models import vgg
    from bcos.modules import BcosConv2d, norms

    make = getattr(vgg, name, None)
    layers = {"norm_layer": norms.NoBias(norms.BatchNormUncentered2d)} if name.endswith("_bnu") else {}
    return None if make is None else make(num_classes=num_classes, conv_layer=BcosConv2d, **layers)


def _bcos_vit(name: str, num_classes: int) -> nn.Module | None:
    """With the layers, and the bias of the logits, that its authors' configurations give it."""
    from bcos.models import vit
    from bcos.modules import BcosConv2d, BcosLinear, LogitLayer, norms
    from bcos.modules.common import BcosSequential

    make = getattr(vit, name, None)
    if make is None:
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are trying to use the entrypoints")  # which lack these layers
        model = make(
            num_classes=num_classes,
            linear_layer=BcosLinear,
            conv2d_layer=BcosConv2d,
            norm_layer=norms.NoBias(norms.DetachableLayerNorm),
            norm2d_layer=norms.NoBias(norms.DetachableGNLayerNorm2d),
            act_layer=nn.Identity,
        )
    return BcosSequential(model, LogitLayer(logit_bias=-math.log(max(num_classes - 1, 1))))  # type: ignore[no-any-return]


def _load_bcos(model: nn.Module, name: str) -> None:
    """ImageNet's weights, which bcos downloads, but for the last layer."""
    from bcos.models import pretrained

    entry = getattr(pretrained, name, None)
    if name not in pretrained.list_available() or entry is None:
        raise NetworkError(f"bcos/{name}: has no pretrained weights; bcos has some for {pretrained.list_available()}")
    known, own = entry(pretrained=True).state_dict(), model.state_dict()
    fitting = {key: tensor for key, tensor in known.items() if key in own and own[key].shape == tensor.shape}
    model.load_state_dict({**own, **fitting})
