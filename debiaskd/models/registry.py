"""Build networks by name, as in recipes, with their weights.

resnet18              timm
torchvision/resnet18  torchvision
bcos/resnet18         the B-cos networks of their authors' package
hf/resnet             transformers, from a configuration; hf/FOLDER: of a local folder (`debiaskd.models.hugging_face`)
small/8,16/1,32       3×3 convolutions of these widths, each halving the map but for those of stride 1 (`SmallNet`)
cifar/resnet20        the CIFAR ResNets of He et al. 2016 (depths 6n + 2), without parameters in their shortcuts
my_nets:Net           a callable of the user's, see `debiaskd.models.own`; names given to `register_model`, too
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.models.bcos_networks import build_bcos
from debiaskd.models.hugging_face import build_hugging_face
from debiaskd.models.input import InputContract
from debiaskd.models.input_sources import accepts
from debiaskd.models.last_layers import classifiers_of, tame
from debiaskd.models.own import build_own, is_own
from debiaskd.models.weight_files import LastLayerWarning, load_weights, save_weights, weights_file, weights_hash
from debiaskd.models.weight_reading import NetworkError, one_line
from debiaskd.models.zoo import cifar as cifar_models
from debiaskd.models.zoo.bias_free import bias_free
from debiaskd.models.zoo.small import CifarResNet, SmallNet

__all__ = [
    "LastLayerWarning",
    "NetworkError",
    "build",
    "load_weights",
    "prepare",
    "save_weights",
    "weights_file",
    "weights_hash",
]


def build(
    name: str,
    num_classes: int,
    *,
    pretrained: bool = False,
    size: tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a network with a head for `num_classes`; random weights come from torch's global generator.

    Args:
        name, num_classes, pretrained: see there.
        size: (height, width) of its input. Networks for a single size (a ViT's position embeddings) are built for this
            one. None: the default size.
        options: keyword arguments of timm's `create_model`, of torchvision's builder, of transformers' configuration
            or of the user's callable.

    Raises:
        NetworkError: no such network, or no pretrained weights for it; they could not be downloaded; it cannot be built
            for images of this size, or with these options.
        ModuleNotFoundError: the package that has it is not installed.
    """
    family, slash, rest = name.partition("/")
    make, options = _FAMILIES.get(family) if slash else None, dict(options or {})
    own = make is None and is_own(name)
    if pretrained and (own or make not in (None, _torchvision, build_bcos, build_hugging_face)):
        raise NetworkError(f"{name}: has no pretrained weights that could be loaded; give a file of weights")
    if own:
        _refuse_ambiguous(name)
        return build_own(name, num_classes, options)
    if options and make not in (None, _torchvision, build_hugging_face):
        raise NetworkError(f"{name}: takes no options, got {', '.join(options)}")
    sized = not {"img_size", "image_size"}.isdisjoint(options)
    other = None if sized or size is None or accepts(name, size, pretrained=pretrained) else size
    try:
        if make is None:
            return _timm(name, num_classes, pretrained, other, options)
        if make in (_torchvision, build_hugging_face):
            return make(rest, num_classes, pretrained, other, options)
        return make(rest, num_classes, pretrained)
    except OSError as error:
        if not pretrained:
            raise
        why = one_line(error)[:300]
        raise NetworkError(
            f"{name}: its pretrained weights could not be fetched ({why}). Build it once where there is a network: "
            "they are kept in the cache of torch or of Hugging Face, which can be copied"
        ) from None


def _refuse_ambiguous(name: str) -> None:
    import timm

    if ":" not in name and timm.is_model(name):
        raise NetworkError(f"{name}: is registered with register_model, and timm has a network of this name; rename it")


def _timm(
    name: str, num_classes: int, pretrained: bool, size: tuple[int, int] | None, given: Mapping[str, Any]
) -> nn.Module:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        near = ", ".join(timm.list_models(f"*{name.partition('.')[0]}*")[:5])
        raise NetworkError(
            f"{name}: timm has no such network{f'; it has {near}' if near else ''} "
            f"(others are named {', '.join(f'{family}/…' for family in _FAMILIES)}; one of your own, "
            "package.module:callable)"
        )
    options: dict[str, Any] = {} if size is None else {"img_size": size[0] if size[0] == size[1] else size}
    options |= given
    try:
        found: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
    except (TypeError, AssertionError, ValueError) as error:
        why = " ".join(str(error).split())
        if given:
            raise NetworkError(f"{name}: cannot be built with {_listed(given)} ({why})") from None
        if size is None:
            raise
        raise NetworkError(f"{name}: cannot be built for images of {size[0]}×{size[1]} pixels ({why})") from None
    except RuntimeError as error:  # such as a tag of pretrained weights that is none
        raise NetworkError(f"{name}: {one_line(error)}") from None
    if pretrained and pretrained_classes(name, found) != num_classes:
        for layer in classifiers_of(found):
            tame(layer)
    return found


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def _torchvision(
    name: str,
    num_classes: int,
    pretrained: bool,
    size: tuple[int, int] | None = None,
    given: Mapping[str, Any] | None = None,
) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise NetworkError(f"torchvision/{name}: torchvision has no such classifier")
    if size is not None and (pretrained or size[0] != size[1]):
        raise NetworkError(f"torchvision/{name}: cannot be built for images of {size[0]}×{size[1]} pixels")
    if not pretrained:
        options: dict[str, Any] = {}
        if size is not None:
            options = {"input_size": size} if name.startswith("maxvit_") else {"image_size": size[0]}
        return _without_auxiliary(_tv_model(name, given, num_classes=num_classes, **options))
    model = _without_auxiliary(_tv_model(name, given, weights="DEFAULT"))
    last = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    if model.get_submodule(last).out_features == num_classes:
        return model
    parent, _, attribute = last.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Linear(model.get_submodule(last).in_features, num_classes))  # type: ignore[arg-type]
    return model


def _tv_model(name: str, given: Mapping[str, Any] | None, **options: Any) -> nn.Module:
    from torchvision import models

    try:
        return models.get_model(name, **{**options, **(given or {})})  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        if not given:
            raise
        why = one_line(error)
        raise NetworkError(f"torchvision/{name}: cannot be built with {_listed(given)} ({why})") from None


def _without_auxiliary(model: nn.Module) -> nn.Module:
    """Take off GoogLeNet's and Inception's auxiliary heads, which make the output a tuple in training mode.

    They have losses of their own in the papers, and no term here has those.
    """
    if getattr(model, "aux_logits", False):
        model.aux_logits = False  # type: ignore[assignment]
        for name in ("aux1", "aux2", "AuxLogits"):
            if hasattr(model, name):
                setattr(model, name, None)
    return model


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
_FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "torchvision": _torchvision,
    "bcos": build_bcos,
    "hf": build_hugging_face,
    "small": _small,
    "cifar": _cifar,
}


def pretrained_classes(name: str, model: nn.Module) -> int:
    """How many classes the last layer of a network's pretrained weights has; 0 if they have none.

    Where a network of `build` has another number, its last layer is random, whatever else was loaded.
    """
    family, slash, _ = name.partition("/")
    if slash and family in _FAMILIES and family != "hf":
        return 1000  # of ImageNet: torchvision and bcos have no others
    loose: Any = model
    return int((getattr(loose, "pretrained_cfg", None) or {}).get("num_classes", 1000))


def prepare(model: nn.Module, reads: InputContract, *, x_dnn: bool = False, classes: int | None = None) -> nn.Module:
    """Test a network on its input before training.

    Args:
        model: made bias-free with `x_dnn`.
        reads: what it is tried on.
        x_dnn: see there.
        classes: how many logits it must give an image; None: any number.

    Raises:
        NetworkError: it does not run on them, gives something else than logits, or cannot be made bias-free.
    """
    size, example = reads.size, reads.example(2)
    try:
        if x_dnn:
            model = bias_free(model, example)
        mode = model.training
        with torch.no_grad():
            logits = model.eval()(example)
        model.train(mode)
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:
        message = one_line(error)
        raise NetworkError(f"{type(model).__name__}: does not run on {size[0]}×{size[1]} images ({message})") from None
    expected = f"{type(model).__name__}: must give logits [N,{classes or 'K'}] for {size[0]}×{size[1]} images"
    if not isinstance(logits, Tensor):
        raise NetworkError(f"{expected}, got {type(logits).__name__}")
    if logits.dim() != 2 or len(logits) != len(example) or classes not in (None, logits.shape[1]):
        raise NetworkError(f"{expected}, got {list(logits.shape)} for {len(example)}")
    return model
