"""Resolve the input contract of a recipe's network: each part comes from the first source that defines it.

1. the recipe's keys (`student.input`, `teacher.input`);
2. the weights: the contract saved in a run, the configuration beside a file, timm's `pretrained_cfg`, torchvision's
   `weights.transforms()`, the `preprocessor_config.json` of a folder of transformers;
3. ImageNet's mean and std, bilinear interpolation.

The size differs: weights alone do not enlarge the images of a data set. It is the recipe's `input.size`, else the size
of a network that runs on no other (a ViT's position embeddings), else `data.size`, else the size that a run's student
was trained on, else the size of the prepared images.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from debiaskd.models import hugging_face
from debiaskd.models.input import INTERPOLATIONS, InputContract, default_contract, inverse_added, saved
from debiaskd.models.weight_reading import NetworkError

#: transformers names interpolation by PIL's numbers.
_PIL: dict[Any, str] = {0: "nearest", 2: "bilinear", 3: "bicubic"}


def resolve(
    name: str,
    prepared: tuple[int, int],
    *,
    asked: Mapping[str, Any] | None = None,
    data_size: int | None = None,
    pretrained: bool = False,
    weights: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[InputContract, str]:
    """The contract of a network of a recipe.

    Args:
        name: of the network, as in recipes.
        prepared: (height, width) of the prepared images.
        asked: the recipe's `input`; None or absent values are left to the other sources.
        data_size: the recipe's `data.size`.
        pretrained: whether it begins from the weights that timm or torchvision know under the name.
        weights: a file that it begins from.
        options: what it is built with; of these `img_size` (transformers: `image_size`) says what it reads.

    Returns:
        The contract, and in words where mean and std come from.
    """
    own = {key: value for key, value in (asked or {}).items() if value is not None}
    found, source = default_contract(name, prepared).to_dict(), "ImageNet's mean and std by default"
    if inverse_added(name):
        source = "B-cos"
    known = None
    if weights is not None:
        known, origin = saved(weights, name), str(weights)
    saved_size = None if known is None else tuple(known.size)
    if known is None and (pretrained or weights is not None) and not inverse_added(name):
        known, origin = None if weights is None else beside(weights, prepared), f"the configuration beside {weights}"
        if known is None:
            known, origin = published(name, prepared), f"the pretrained weights of {name}"
    if known is not None:
        found, source = known.to_dict(), origin
    built_for = (options or {}).get("img_size", (options or {}).get("image_size"))
    if built_for is not None and "size" not in own:
        own["size"] = built_for
    wanted = (data_size, data_size) if data_size is not None else saved_size or prepared
    if "size" in own:
        own["size"] = tuple(own["size"]) if isinstance(own["size"], (list, tuple)) else (own["size"],) * 2
    elif accepts(name, wanted, pretrained=pretrained):
        found["size"] = wanted
    else:
        found["size"] = saved_size or fixed_size(name, pretrained=pretrained)
    if "mean" in own or "std" in own:
        source = "the recipe"
    return InputContract.from_dict({**found, **own}), source


def beside(file: Path, size: tuple[int, int]) -> InputContract | None:
    """What the configuration in the folder of a file of weights says, at another size: timm's `config.json` or
    transformers' `preprocessor_config.json`, as both have on the Hugging Face hub. None without one."""
    config = _json(file.parent / "config.json")
    found = config.get("pretrained_cfg", config)
    processor = _json(file.parent / "preprocessor_config.json")
    if isinstance(found, dict) and {"mean", "std"} <= set(found):
        mean, std, interpolation = found["mean"], found["std"], str(found.get("interpolation"))
    elif {"image_mean", "image_std"} <= set(processor):
        mean, std = _normalization(processor, file.parent / "preprocessor_config.json")
        interpolation = _PIL.get(processor.get("resample"), "bicubic")
    else:
        return None
    for values in (mean, std):
        if not isinstance(values, list) or len(values) != 3 or not all(isinstance(v, (int, float)) for v in values):
            return None
    return InputContract(size, tuple(map(float, mean)), tuple(map(float, std)), _known(interpolation))


def _normalization(processor: dict[str, Any], file: Path) -> tuple[Any, Any]:
    """Mean and std of pixels in 0..1, from those that transformers applies to the pixels that it rescaled.

    Raises:
        NetworkError: the network reads the channels in another order than red, green, blue.
    """
    if processor.get("do_flip_channel_order"):
        raise NetworkError(f"{file}: do_flip_channel_order: networks that read blue, green, red are not supported")
    mean, std = processor["image_mean"], processor["image_std"]
    if processor.get("do_normalize") is False:
        mean, std = [0.0] * 3, [1.0] * 3
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    scale, offset = 255 * factor, 1.0 if processor.get("rescale_offset") else 0.0
    if (abs(scale - 1) > 1e-6 or offset) and isinstance(mean, list) and isinstance(std, list):
        mean, std = [(value + offset) / scale for value in mean], [value / scale for value in std]
    return mean, std


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def published(name: str, size: tuple[int, int]) -> InputContract | None:
    """What the authors of a name's pretrained weights trained with, at another size; None where nothing is known."""
    family, slash, rest = name.partition("/")
    if family == hugging_face.FAMILY:
        folder = hugging_face.folder_of(name)
        return None if folder is None else beside(folder / "model.safetensors", size)
    if slash and family == "torchvision":
        made = _torchvision_transforms(rest)
        if made is None:
            return None
        return InputContract(size, tuple(made.mean), tuple(made.std), _known(str(made.interpolation.value)))
    config = None if slash else timm_config(name)
    if config is None:
        return None
    return InputContract(size, tuple(config.mean), tuple(config.std), _known(config.interpolation))


def fixed_size(name: str, *, pretrained: bool = False) -> tuple[int, int] | None:
    """(height, width) that a network is said to be built for, None for one that is not; see `accepts`."""
    family, slash, rest = name.partition("/")
    if slash and family == "torchvision":
        if not rest.startswith(("vit_", "maxvit_")):
            return None
        made = _torchvision_transforms(rest) if pretrained else None
        side = 224 if made is None else int(made.crop_size[0])
        return side, side
    if family == hugging_face.FAMILY:
        return hugging_face.fixed_size(name)
    config = None if slash else timm_config(name)
    if config is None or not config.fixed_input_size:
        return None
    height, width = config.input_size[-2:]
    return height, width


@functools.lru_cache(maxsize=64)
def accepts(name: str, size: tuple[int, int], *, pretrained: bool = False) -> bool:
    """Whether a network runs on images of this size as it is built by default; True for those that say nothing of it.

    timm marks as fixed some that run on others, too (XCiT, Twins): those that are marked are tried, without memory.
    """
    fixed = fixed_size(name, pretrained=pretrained)
    if fixed is None or fixed == size:
        return True
    family, slash, rest = name.partition("/")
    if slash and family != hugging_face.FAMILY:
        return False
    import timm

    try:
        with torch.device("meta"), torch.no_grad():
            if slash:
                model = hugging_face.build_hugging_face(rest, 2, False, None, {})
            else:
                model = timm.create_model(name, num_classes=2)
            model.eval()(torch.zeros(1, 3, *size))
    except (RuntimeError, ValueError, TypeError, AssertionError):
        return False
    return True


def timm_config(name: str) -> Any:
    """timm's `PretrainedCfg` of a name, with or without a tag; None if timm has no such network or tag."""
    import timm
    from timm.models import get_pretrained_cfg

    if ":" in name or not timm.is_model(name.partition(".")[0]):
        return None
    return get_pretrained_cfg(name, allow_unregistered=True)


def _torchvision_transforms(name: str) -> Any:
    from torchvision import models

    try:
        return models.get_model_weights(name)["DEFAULT"].transforms()
    except (ValueError, KeyError):  # no such network, or none with weights
        return None


def _known(interpolation: str) -> str:
    return interpolation if interpolation in INTERPOLATIONS else "bicubic"
