"""Load weight files of common training scripts without executing code from them.

A file is a set of named tensors (`.safetensors`, its shards with an index, a state dict) or a checkpoint that has one
below a key, beside options, metrics and optimizer state. Names may carry the prefixes of the wrappers that a network
was trained in. The state dict that matches the network is loaded; a moving average of the weights takes precedence,
because such scripts evaluate it (timm's `load_checkpoint` does the same).
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from debiaskd.models.last_layers import tame
from debiaskd.models.weight_reading import INDEX, NetworkError, read, shards
from debiaskd.utils import files

#: Keys below which a state dict may lie: of moving averages, then of the weights themselves.
AVERAGES = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "model_ema_state_dict")
KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights")
#: What wrappers put before a network's own names: DistributedDataParallel, torch.compile, Lightning and their like.
PREFIXES = ("module.", "_orig_mod.", "model.", "student.", "backbone.", "net.", "network.")
#: What `torch.optim.swa_utils.AveragedModel` counts beside the weights.
COUNTERS = ("n_averaged",)
#: torchvision's auxiliary heads, which its files hold and the networks that are built here do not have.
AUXILIARY = ("aux1", "aux2", "AuxLogits")
#: What batch norm counts, and files of before 2018 do not have.
TRACKED = ".num_batches_tracked"


class LastLayerWarning(UserWarning):
    """The class counts differ, so that the last layer is re-initialised."""


@dataclass(frozen=True)
class Candidate:
    """A state dict that a file may be meant for, and where in the file it was found."""

    state: dict[str, Tensor]
    keys: tuple[str, ...] = ()
    prefix: str = ""
    left: int = 0

    def described(self) -> str:
        """One line; "" for tensors that are the file's own, under their own names."""
        parts = []
        if self.keys:
            average = " (the moving average of the weights)" if set(self.keys) & set(AVERAGES) else ""
            parts.append(f"took {'.'.join(self.keys)!r}{average}")
        if self.prefix:
            parts.append(f"took off the prefix {self.prefix!r}")
        if self.left:
            parts.append(f"left out {self.left} tensor{'s' if self.left > 1 else ''} beside them")
        return ", ".join(parts)


def load_weights(model: nn.Module, path: Path | str, *, to_train: bool = False) -> str:
    """Load all of a network's weights from a file without executing code from it.

    Args:
        model: the network, changed in place once all tensors match.
        path: a `.safetensors` file; the index of a sharded one (`model.safetensors.index.json`); a state dict or a
            checkpoint that `torch.save` wrote; a folder with one of them, or the folder of a finished run.
        to_train: if only the last layer's number of classes differs, keep that layer of `model`, rebuilt where its
                random weights are far too large for fine-tuning (`last_layers.tame`).

    Returns:
        One line about what was loaded: the key, the prefix that was taken off, the moving average. "" for a file that
        holds these tensors alone, under the network's own names.

    Warns:
        LastLayerWarning: the last layer is not loaded.

    Raises:
        NetworkError: missing, damaged, or of another network; names the first tensors that do not fit, or the object
            that could not be read without running code.

    Example:
        >>> import tempfile, torch
        >>> from debiaskd.models import SmallNet
        >>> from debiaskd.models.weight_files import load_weights
        >>> net = SmallNet((4, 8), (2, 2), num_classes=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"model": {f"module.{k}": v for k, v in net.state_dict().items()}}, f"{folder}/net.pt")
        ...     load_weights(net, f"{folder}/net.pt")
        "took 'model', took off the prefix 'module.'"
    """
    file = weights_file(path)
    own = model.state_dict()
    candidates = list(_candidates(read(file), own))
    taken_off = tuple(f"{name}." for name in AUXILIARY if getattr(model, name, own) is None)
    if taken_off:
        candidates = [
            replace(one, state={name: tensor for name, tensor in one.state.items() if not name.startswith(taken_off)})
            for one in candidates
        ]
    found, wrong = _best(own, candidates, to_train)
    if found is None:
        raise NetworkError(f"{file}: holds no state dict")
    state = dict(found.state)
    if wrong and to_train and _is_last_layer(own, state, wrong):
        layer, there, here = wrong[0].rpartition(".")[0], len(state[wrong[0]]), len(own[wrong[0]])
        what = f"its last layer, {layer}, is of {there} classes and not of {here}"
        warnings.warn(f"{file}: {what}; it is re-initialised, all else as in the file", LastLayerWarning, stacklevel=2)
        tame(model.get_submodule(layer))
        state |= {name: own[name] for name in wrong}
    elif wrong:
        name = wrong[0]
        raise NetworkError(
            f"{file}: of another network: {name} is {_shape(state, name)} there and {_shape(own, name)} here"
            + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
            + (_advice(file) or str(getattr(model, "weights_advice", "")))
        )
    model.load_state_dict(state)
    return found.described()


def weights_file(path: Path | str) -> Path:
    """The file itself; of a folder, its safetensors, or their index; of a run's folder, those of the student."""
    file = Path(path)
    if not file.is_dir():
        return file
    folder = file / "student" if (file / "student").is_dir() else file
    for name in ("model.safetensors", f"model{INDEX}", "pytorch_model.bin"):
        if (folder / name).exists():
            return folder / name
    return folder / "model.safetensors"


def weights_hash(path: Path | str) -> str:
    """SHA-256 of a file of weights, wherever it lies; of an index, with all of its shards.

    Raises:
        NetworkError: there is no such file.
    """
    file = weights_file(path)
    try:
        if not file.name.endswith(INDEX):
            return files.sha256(file)
        hashes = [f"{shard} {files.sha256(file.parent / shard)}" for shard in sorted(set(shards(file).values()))]
        return hashlib.sha256("\n".join([files.sha256(file), *hashes]).encode()).hexdigest()
    except FileNotFoundError as error:
        raise NetworkError(f"{error.filename}: there is no such file of weights") from None


def save_weights(model: nn.Module, path: Path, about: dict[str, Any]) -> None:
    """Write a network's tensors as .safetensors; `about`, JSON, goes into the metadata."""
    from safetensors.torch import save_file

    # Under one name each: safetensors stores no tensor twice.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={"debiaskd": json.dumps(about, sort_keys=True)})


# -- which tensors ----------------------------------------------------------------------------------------------------


def _candidates(content: Any, own: Mapping[str, Any], keys: tuple[str, ...] = ()) -> Iterator[Candidate]:
    """State dicts in a file, in the order in which they are tried."""
    if not isinstance(content, Mapping) or len(keys) > 2:
        return
    for key in (*AVERAGES, *KEYS):
        yield from _candidates(content.get(key), own, (*keys, key))
    state = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    needed = {name for name in own if not name.endswith(TRACKED)}
    if state and (len(state) == len(content) or needed <= state.keys()):  # an epoch may lie among the tensors
        yield from _unwrapped(Candidate(state, keys))


def _unwrapped(found: Candidate) -> Iterator[Candidate]:
    """The same under other names: as they are, and behind every prefix of a wrapper."""
    yield found
    counted = {name: tensor for name, tensor in found.state.items() if name not in COUNTERS}
    if len(counted) < len(found.state):
        yield Candidate(counted, found.keys, found.prefix, found.left)
    for prefix in PREFIXES:
        inner = {name.removeprefix(prefix): tensor for name, tensor in counted.items() if name.startswith(prefix)}
        if inner:
            left = found.left + len(counted) - len(inner)
            yield from _unwrapped(Candidate(inner, found.keys, found.prefix + prefix, left))
    # torch.compile on a part of a network leaves its mark in the middle of names.
    compiled = {name.replace("._orig_mod.", "."): tensor for name, tensor in counted.items()}
    if compiled.keys() != counted.keys():
        yield from _unwrapped(Candidate(compiled, found.keys, f"{found.prefix}…_orig_mod.", found.left))


def _best(own: dict[str, Any], candidates: list[Candidate], to_train: bool) -> tuple[Candidate | None, list[str]]:
    """The first that fits, else the first that fits but for its last layer, else the one that comes closest."""
    closest: tuple[int, Candidate | None, list[str]] = (0, None, [])
    for found in candidates:
        for name, tensor in own.items():
            if name.endswith(TRACKED):
                found.state.setdefault(name, tensor)
        wrong = [name for name in {**own, **found.state} if _shape(own, name) != _shape(found.state, name)]
        if not wrong:
            return found, []
        # A last layer of other classes is nearer than any other difference, however few tensors that is in.
        distance = 1 if to_train and _is_last_layer(own, found.state, wrong) else 1 + len(wrong)
        if closest[1] is None or distance < closest[0]:
            closest = (distance, found, wrong)
    return closest[1], closest[2]


def _is_last_layer(own: dict[str, Any], state: dict[str, Any], wrong: list[str]) -> bool:
    """Whether tensors of one layer differ, in their outputs alone: another layer that read these would differ, too."""
    one_layer = len({name.rpartition(".")[0] for name in wrong}) == 1
    in_both = all(name in own and name in state and own[name].dim() == state[name].dim() for name in wrong)
    return one_layer and in_both and all(own[name].shape[1:] == state[name].shape[1:] for name in wrong)


def _shape(state: dict[str, Any], name: str) -> str:
    return str(list(state[name].shape)) if name in state else "missing"


def _advice(file: Path) -> str:
    if re.search(r"-\d+-of-\d+\.safetensors$", file.name):
        return f"; it is one of several shards: give their index, …{INDEX}"
    return ""
