"""Networks by name, as recipes give them, with their weights.

resnet18              timm
torchvision/resnet18  torchvision
bcos/resnet18         the B-cos networks of their authors' package
small/8,16/1,32       3×3 convolutions of these widths, each halving the map but for those of stride 1 (`SmallNet`)
cifar/resnet20        the CIFAR ResNets of He et al. 2016 (depths 6n + 2), without parameters in their shortcuts
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from debiaskd import cifar_models
from debiaskd.bias_free import bias_free
from debiaskd.models import CifarResNet, SmallNet
from debiaskd.weight_files import (
    LastLayerWarning,
    load_weights,
    save_weights,
    weights_file,
    weights_hash,
)
from debiaskd.weight_reading import NetworkError, one_line

__all__ = [
    "LastLayerWarning",
    "NetworkError",
    "build",
    "inverse_added",
    "load_weights",
    "prepare",
    "save_weights",
    "weights_file",
    "weights_hash",
    "with_inverse",
]


def build(name: str, num_classes: int, *, pretrained: bool = False) -> nn.Module:
    """A network with a head for `num_classes`; its random weights come from torch's global generator.

    Raises:
        NetworkError: no such network, or none that has pretrained weights; they could not be fetched.
        ModuleNotFoundError: the package that has it is not installed.
    """
    family, slash, rest = name.partition("/")
    make = _FAMILIES.get(family) if slash else None
    if pretrained and make not in (None, _torchvision, _bcos):
        raise NetworkError(f"{name}: has no pretrained weights that could be loaded; give a file of weights")
    try:
        return _timm(name, num_classes, pretrained) if make is None else make(rest, num_classes, pretrained)
    except OSError as error:
        if not pretrained:
            raise
        why = one_line(error)[:300]
        raise NetworkError(
            f"{name}: its pretrained weights could not be fetched ({why}). Build it once where there is a network: "
            "they are kept in the cache of torch or of Hugging Face, which can be copied"
        ) from None


def _timm(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        near = ", ".join(timm.list_models(f"*{name.partition('.')[0]}*")[:5])
        raise NetworkError(
            f"{name}: timm has no such network{f'; it has {near}' if near else ''} "
            f"(others are named {', '.join(f'{family}/…' for family in _FAMILIES)})"
        )
    try:
        found: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    except RuntimeError as error:  # such as a tag of pretrained weights that is none
        raise NetworkError(f"{name}: {one_line(error)}") from None
    return found


def _torchvision(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise NetworkError(f"torchvision/{name}: torchvision has no such classifier")
    if not pretrained:
        return models.get_model(name, num_classes=num_classes)  # type: ignore[no-any-return]
    model: nn.Module = models.get_model(name, weights="DEFAULT")
    last = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, attribute = last.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Linear(model.get_submodule(last).in_features, num_classes))  # type: ignore[arg-type]
    return model


def _bcos(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    from bcos import models

    for module in ("resnet", "densenet", "vgg", "convnext", "vit"):
        make = getattr(getattr(models, module, None), name, None)
        if callable(make):
            found: nn.Module = make(num_classes=num_classes)
            if pretrained:
                _load_bcos(found, name)
            return found
    raise NetworkError(f"bcos/{name}: the bcos package has no such network")


def _load_bcos(model: nn.Module, name: str) -> None:
    """ImageNet's weights, which bcos downloads, but for the last layer."""
    from bcos.models import pretrained

    entry = getattr(pretrained, name, None)
    if name not in pretrained.list_available() or entry is None:
        raise NetworkError(f"bcos/{name}: has no pretrained weights; bcos has some for {pretrained.list_available()}")
    known, own = entry(pretrained=True).state_dict(), model.state_dict()
    fitting = {key: tensor for key, tensor in known.items() if key in own and own[key].shape == tensor.shape}
    model.load_state_dict({**own, **fitting})


def _small(widths: str, num_classes: int, pretrained: bool) -> nn.Module:
    parts = [_CONVOLUTION.fullmatch(part) for part in widths.split(",")]
    found = [(int(part["width"]), int(part["stride"] or 2)) for part in parts if part is not None]
    if len(found) < len(parts):
        raise NetworkError(f"small/{widths}: must be widths of convolutions, such as small/8,16,32 or small/8/1,16,32")
    return SmallNet([width for width, _ in found], [stride for _, stride in found], num_classes)


_CONVOLUTION = re.compile(r"(?P<width>[1-9]\d*)(/(?P<stride>[1-9]\d*))?")


def _cifar(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    if name in _CIFAR:
        return _CIFAR[name](num_classes)
    kind, *numbers = name.split("-") if name.startswith("wrn-") else [name[:6], name[6:]]
    try:
        if kind == "wrn" and len(numbers) == 2:
            return cifar_models.wide_resnet(int(numbers[0]), int(numbers[1]), num_classes)
        if kind == "resnet":
            return CifarResNet(int(numbers[0]), num_classes)
    except ValueError as error:
        raise NetworkError(f"cifar/{name}: {error}") from None
    raise NetworkError(
        f"cifar/{name}: must be one of cifar/resnet20, cifar/wrn-16-2, {', '.join(f'cifar/{n}' for n in _CIFAR)}"
    )


_CIFAR = {
    "resnet50": cifar_models.resnet50,
    "vgg8": cifar_models.vgg8,
    "mobilenetv2": cifar_models.mobilenetv2,
}
_FAMILIES = {"torchvision": _torchvision, "bcos": _bcos, "small": _small, "cifar": _cifar}


def inverse_added(name: str) -> bool:
    """Whether the network reads six channels, each picture with its inverse, and pixels in 0..1 (B-cos)."""
    return name.startswith("bcos/")


def with_inverse(images: Tensor) -> Tensor:
    """[N,3,H,W] in 0..1 to [N,6,H,W]."""
    return torch.cat([images, 1 - images], 1)


def prepare(model: nn.Module, size: tuple[int, int], *, x_dnn: bool = False, six: bool = False) -> nn.Module:
    """Tries the network on pictures of `size` before anything is trained.

    Raises:
        NetworkError: it does not run on them, or cannot be made bias-free.
    """
    example = torch.rand(2, 6 if six else 3, *size, generator=torch.Generator().manual_seed(0))
    try:
        if x_dnn:
            model = bias_free(model, example)
        mode = model.training
        with torch.no_grad():
            logits = model.eval()(example)
        model.train(mode)
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:
        message = one_line(error)
        raise NetworkError(
            f"{type(model).__name__}: does not run on {size[0]}×{size[1]} pictures ({message})"
        ) from None
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise NetworkError(f"{type(model).__name__}: must give logits [N,K] for {size[0]}×{size[1]} pictures")
    return model
