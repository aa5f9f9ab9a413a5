"""A run's student as a folder in the layout of the Hugging Face hub, and back.

    FOLDER/model.safetensors    the weights
    FOLDER/config.json          timm's configuration, with the input contract and the labels; under "debiaskd" what
                                rebuilds the network, and its metrics; written last
    FOLDER/README.md            the model card (`debiaskd.reports.model_card`)

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads the networks that are timm's own. Students that are more,
such as those with a transplanted head, and networks from elsewhere are loaded by `debiaskd.load`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from debiaskd.data.packed import manifest
from debiaskd.evaluation.evaluate import LoadedStage
from debiaskd.models.input import InputContract
from debiaskd.models.own import GIVEN, give, given_name
from debiaskd.models.registry import load_weights
from debiaskd.training.rebuild import Design
from debiaskd.training.run import RunError
from debiaskd.utils import files
from debiaskd.version import __version__

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


class Pretrained:
    """A student that was written by `Run.save_pretrained`.

    Args:
        folder: where it lies.
        student: the module that was given to `train`, if one was and this is another process.

    Attributes:
        student: on the CPU, in evaluation mode; normalized images [N,3,H,W] to logits [N,K].
        contract: what it reads; `debiaskd.models.input.Preprocess` makes that of images.
        classes: names of the K classes.
        metrics: of the run, by split, as fractions.

    Raises:
        RunError: it is no such folder, or not whole, or another module than was trained.
        NetworkError: the network cannot be rebuilt.
    """

    def __init__(self, folder: Path | str, *, student: nn.Module | None = None) -> None:
        self.folder = Path(folder)
        document = read_config(self.folder)
        own = document["debiaskd"]
        design = Design.from_dict(own["design"])
        self.classes: list[str] = list(document["label_names"])
        self.contract = InputContract.from_dict(own["input"])
        self.metrics: dict[str, dict[str, float]] = own["metrics"]
        if student is not None:
            name = design.network.name
            if not name.startswith(GIVEN) or given_name(student) != name:
                raise RunError(f"{self.folder}: its student must be {name}, got {given_name(student)}")
            give(student)
        path = self.folder / WEIGHTS
        if not path.is_file() or files.sha256(path) != own["sha256"]:
            raise RunError(f"{path}: missing or damaged")
        self.student = design.build()
        load_weights(self.student, path)
        self.student.eval()

    def __repr__(self) -> str:
        return f"Pretrained({str(self.folder)!r}, {len(self.classes)} classes, {self.contract})"


def is_pretrained(folder: Path) -> bool:
    """Whether a folder was written by `Run.save_pretrained`."""
    try:
        read_config(folder)
    except RunError:
        return False
    return True


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration.

    Raises:
        RunError: there is none, or it is not debiaskd's.
    """
    try:
        document = files.read_json(folder / CONFIG)
    except ValueError:
        document = None
    if not isinstance(document, dict) or "debiaskd" not in document:
        raise RunError(f"{folder}: is neither a run's folder nor one of save_pretrained")
    return document


def is_timms(design: Design) -> bool:
    """Whether timm builds the network from its name and options alone."""
    import timm

    name = design.network.name
    return design.plain and not design.network.bias_free and timm.is_model(name.partition(".")[0])


def write_weights(loaded: LoadedStage, path: Path) -> None:
    """Write the student's weights, with the metadata that the hub's libraries expect.

    Raises:
        OSError: they cannot be written.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save

    source = loaded.stage.model
    with safe_open(source, "pt") as opened:
        metadata = dict(opened.metadata() or {})
    about = json.loads(metadata["debiaskd"])
    for base in about.get("bases", {}).values():
        _portable(base)
    metadata |= {"debiaskd": json.dumps(about), "format": "pt"}
    content = _in_order(save(load_file(source), metadata))
    files.write(path, lambda unfinished: unfinished.write_bytes(content))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with sorted metadata: safetensors writes several keys in an order that changes."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned; their offsets count from the end of the header
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def config(loaded: LoadedStage, metrics: Mapping[str, Mapping[str, float]], sha256: str) -> dict[str, Any]:
    """What `config.json` holds.

    Args:
        loaded: the student.
        metrics: by split.
        sha256: of the weights' file.
    """
    network, contract, loose = loaded.network, loaded.contract, _timm_config(loaded)
    fit = _fit(loaded)
    pretrained = {
        "tag": "debiaskd",
        "custom_load": False,
        "input_size": [contract.channels, *contract.size],
        "fixed_input_size": bool(loose.get("fixed_input_size", False)),
        "interpolation": contract.interpolation,
        "crop_pct": 1.0,
        "crop_mode": {"squash": "squash", "pad": "border"}.get(fit or "", "center"),
        "mean": list(contract.mean),
        "std": list(contract.std),
        "num_classes": len(loaded.classes),
        "pool_size": None,
        "first_conv": loose.get("first_conv"),
        "classifier": loose.get("classifier"),
    }
    found: dict[str, Any] = {
        "architecture": network.name.partition(".")[0] if is_timms(loaded.design) else network.name,
        "num_classes": len(loaded.classes),
        "label_names": list(loaded.classes),
        "pretrained_cfg": pretrained,
    }
    if network.options:
        found["model_args"] = dict(network.options)
    found["debiaskd"] = {
        "version": __version__,
        "design": _portable(loaded.design.to_dict()),
        "input": contract.to_dict(),
        "sha256": sha256,
        "metrics": {split: dict(values) for split, values in metrics.items()},
    }
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def _timm_config(loaded: LoadedStage) -> dict[str, Any]:
    loose: Any = loaded.model
    return dict(getattr(loose, "pretrained_cfg", None) or {})


def _fit(loaded: LoadedStage) -> str | None:
    """How images were made square when the data was prepared; None where the data is not there any more."""
    try:
        options = manifest.read(Path(loaded.recipe.data.path))["options"]
    except (ValueError, OSError):
        return None
    return str(options.get("fit"))


def _portable(design: dict[str, Any]) -> dict[str, Any]:
    """Without paths of the machine that trained it, of which nothing is read."""
    for part in (design["recipe"]["student"], design["recipe"]["teacher"]):
        if part is not None:
            part["weights"] = None
            if str(part.get("head")).endswith(".safetensors") or part.get("head") == "probe":
                part["head"] = None
    for base in design["about"].get("bases", {}).values():
        _portable(base)
    return design
