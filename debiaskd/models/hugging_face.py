"""Image classifiers of Hugging Face transformers, by the names of recipes.

hf/resnet        built from the configuration class of a model type, with random weights; `options` are its arguments
hf/FOLDER        of a folder that `save_pretrained` wrote: config.json gives the architecture, `pretrained` its weights

A name without a slash that is a model type is that type; a folder of the same name is written hf/./resnet. Nothing is
downloaded, and no code of the folder is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.models.weight_files import weights_file, weights_hash
from debiaskd.models.weight_reading import NetworkError, one_line

#: The family in recipes' names, and the file that makes a folder one of transformers' models.
FAMILY, CONFIG = "hf", "config.json"
#: Options that the recipe's data determines.
_OF_THE_DATA = ("num_labels", "id2label", "label2id")


class Logits(nn.Module):
    """An image classifier of transformers as a module from images [N,3,H,W] to logits [N,K].

    Args:
        model: such as `ViTForImageClassification`: its output has `logits`.
        trained_classes: how many classes the last layer of its weights knows; 0 if that layer is random.

    Attributes:
        pretrained_cfg: "num_classes" as trained, and the "input_size" that the configuration names, as timm has them.

    Example:
        >>> from transformers import ResNetConfig, ResNetForImageClassification
        >>> config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
        >>> Logits(ResNetForImageClassification(config))(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 2])
    """

    #: What is added to the message about a file of weights that does not fit: transformers renames what it writes.
    weights_advice = "; what transformers wrote is loaded by the name hf/FOLDER with pretrained: true"

    def __init__(self, model: nn.Module, trained_classes: int = 0) -> None:
        super().__init__()
        self.model = model
        side = _sides(getattr(model, "config", None)) or (224, 224)
        self.pretrained_cfg = {"num_classes": trained_classes, "input_size": (3, *side)}

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        logits: Tensor = output.logits
        return logits


def folder_of(name: str) -> Path | None:
    """The folder of a name "hf/FOLDER"; None for a model type and for names of other families.

    Raises:
        NetworkError: neither a model type nor a folder with config.json.
    """
    family, _, rest = name.partition("/")
    if family != FAMILY:
        return None
    folder = Path(rest).expanduser()
    if os.sep not in rest and rest in _types():
        return None
    if not (folder / CONFIG).is_file():
        lacks = f"{folder} has no {CONFIG}" if folder.is_dir() else f"there is no folder {folder}"
        where = "" if folder.is_absolute() else f" in {Path.cwd()}"
        types = ", ".join(sorted(_types()))
        kinds = f"; model types that are built from a configuration: {types}" if os.sep not in rest else ""
        raise NetworkError(f"{name}: {lacks}{where}: a network is built from the configuration in it{kinds}")
    return folder


def build_hugging_face(
    name: str, num_classes: int, pretrained: bool, size: tuple[int, int] | None, given: Mapping[str, Any]
) -> nn.Module:
    """Build the network of a name without its family.

    Args:
        name, num_classes, pretrained: see `debiaskd.models.registry.build`.
        size: (height, width) that it is built for instead of its configuration's; None: as that says.
        given: arguments of its configuration class, such as {"hidden_size": 48}.

    Raises:
        NetworkError: no such model type or folder; unknown options; no weights in the folder, or others.
    """
    shown = f"{FAMILY}/{name}"
    folder = folder_of(shown)
    if pretrained and folder is None:
        raise NetworkError(f"{shown}: is built from a configuration and has no weights; name a folder: hf/FOLDER")
    options = dict(given)
    if size is not None:
        if pretrained or _sides(configuration(shown)) is None:
            raise NetworkError(f"{shown}: cannot be built for images of {size[0]}×{size[1]} pixels")
        options["image_size"] = size[0] if size[0] == size[1] else list(size)
    with _quiet():
        config = configuration(shown, options)
        there = config.num_labels
        config.num_labels = num_classes
        if not pretrained:
            return Logits(_made(shown, config, given))
        assert folder is not None
        return Logits(*_loaded(shown, folder, config, there))


def configuration(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """The configuration of a name "hf/…", with some of its values changed.

    Raises:
        NetworkError: no such model type or folder, or one that has no image classifier; unknown or wrong options.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    folder, changed = folder_of(name), dict(options or {})
    kind = name.partition("/")[2] if folder is None else str(_json(folder / CONFIG).get("model_type"))
    if kind not in _types():
        raise NetworkError(
            f"{name}: transformers has no image classifier of model type {kind}; it has {', '.join(sorted(_types()))}"
        )
    known = CONFIG_MAPPING[kind]()
    for key in changed:
        if key in _OF_THE_DATA:
            raise NetworkError(f"{name}: options.{key}: comes from the data; leave it out")
        if not hasattr(known, key):
            raise NetworkError(f"{name}: {type(known).__name__} has no option {key}")
    try:
        if folder is None:
            return AutoConfig.for_model(kind, **changed)
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **changed)
    except Exception as error:  # each configuration checks its values in a way of its own
        listed = f" with {', '.join(f'{key}={value!r}' for key, value in changed.items())}" if changed else ""
        raise NetworkError(f"{name}: cannot be configured{listed} ({one_line(error)[:300]})") from None


def fixed_size(name: str) -> tuple[int, int] | None:
    """(height, width) that the configuration of a name says the network is for; None if it names none."""
    return _sides(configuration(name))


def folder_hash(name: str, *, weights: bool) -> str | None:
    """SHA-256 of what a folder's network is made of: its configuration, and its weights if they are used. None for
    names without a folder."""
    folder = folder_of(name)
    if folder is None:
        return None
    parts = [hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()]
    if weights:
        parts.append(weights_hash(folder))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _made(name: str, config: Any, given: Mapping[str, Any]) -> nn.Module:
    from transformers import AutoModelForImageClassification

    try:
        return AutoModelForImageClassification.from_config(  # type: ignore[no-any-return]
            config, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:  # of values that do not fit together, whatever the model raises
        listed = f" with {', '.join(f'{key}={value!r}' for key, value in given.items())}" if given else ""
        raise NetworkError(f"{name}: cannot be built{listed} ({one_line(error)[:300]})") from None


def _loaded(name: str, folder: Path, config: Any, there: int) -> tuple[nn.Module, int]:
    """(The model with the folder's weights, how many classes their last layer knows, 0 if they have none)."""
    from transformers import AutoModelForImageClassification

    if not weights_file(folder).is_file():
        raise NetworkError(f"{name}: {folder} holds no weights (model.safetensors)")
    try:
        model, about = AutoModelForImageClassification.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except Exception as error:  # of a damaged file, anything
        raise NetworkError(f"{name}: its weights cannot be loaded ({one_line(error)[:300]})") from None
    missing = [*about["missing_keys"], *(key for key, *_ in about["mismatched_keys"])]
    last = _last_layer(model, config.num_labels)
    wrong = sorted(key for key in missing if key.rpartition(".")[0] not in last)
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise NetworkError(
            f"{name}: its weights are of another network: {wrong[0]} is missing or of another shape{more}"
        )
    return model, 0 if about["missing_keys"] else there


def _last_layer(model: nn.Module, classes: int) -> set[str]:
    """Names of the linear layers outside of the body: the classifier's, of which DeiT and LeViT have several."""
    body = f"{getattr(model, 'base_model_prefix', '')}."
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith(body) and len(module.weight) == classes
    }


def _types() -> Mapping[str, Any]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    return dict(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)


def _sides(config: Any) -> tuple[int, int] | None:
    size = getattr(config, "image_size", None)
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    return (size, size) if isinstance(size, int) else None


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NetworkError(f"{file}: is not JSON ({one_line(error)})") from None
    return found if isinstance(found, dict) else {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports: what matters of them is an error here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
