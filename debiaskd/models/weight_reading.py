"""Read weight files without executing code from them: safetensors, their shards, files of torch.save."""

from __future__ import annotations

import argparse
import json
import pathlib
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: How the index of sharded safetensors is named.
INDEX = ".safetensors.index.json"


class NetworkError(ValueError):
    """A network cannot be built from a name or from weights."""


def one_line(error: BaseException | str) -> str:
    """An error's message without line breaks and without a terminal's escape codes."""
    return " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b", "", str(error)).split())


def read(file: Path) -> Any:
    """The tensors of a safetensors file or an index by their names, or the object that torch.save wrote.

    Raises:
        NetworkError: missing, damaged, or it cannot be read without running code; names the object that needs it.
    """
    from safetensors.torch import load_file

    try:
        if file.name.endswith(INDEX):
            return _sharded(file)
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals(_safe()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'torch.load' received a zip file that looks like a TorchScript")
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise NetworkError(f"{error.filename or file}: there is no such file of weights") from None
    except (NetworkError, MemoryError):
        raise
    except Exception as error:  # of a damaged file, anything
        raise NetworkError(_refusal(file, one_line(error))) from None


def shards(file: Path) -> dict[str, str]:
    """The names of tensors and of the shards that hold them."""
    try:
        places: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(shard, str) and Path(shard).name == shard for shard in places.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        plain = False
    if not plain:
        raise NetworkError(f"{file}: must be an index of shards beside it, with the files' names in weight_map")
    return places


def _sharded(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    places = shards(file)
    read_shards = {shard: load_file(file.parent / shard) for shard in sorted(set(places.values()))}
    for name, shard in places.items():
        if name not in read_shards[shard]:
            raise NetworkError(f"{file}: {name} is missing in {shard}")
    return {name: read_shards[shard][name] for name, shard in places.items()}


def _safe() -> list[Any]:
    """Classes that options and metrics beside weights are made of; none of them runs code of the file."""
    import numpy as np

    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    numbers = [
        kind
        for name, kind in vars(getattr(np, "dtypes", np)).items()
        if name.endswith("DType") and name != "ObjectDType"
    ]
    named = [
        (function, f"numpy.{core}.multiarray.{name}")  # numpy 2 renamed it
        for core in ("core", "_core")
        for function, name in ((scalar, "scalar"), (array, "_reconstruct"))
    ]
    paths = [
        (getattr(pathlib, f"Pure{kind}Path"), f"{module}.{pure}{kind}Path")
        for kind in ("Posix", "Windows")  # of another system's checkpoints, too
        for pure in ("", "Pure")
        for module in ("pathlib", "pathlib._local")
    ]
    return [argparse.Namespace, np.ndarray, np.dtype, *numbers, *named, *paths]


def _refusal(file: Path, message: str) -> str:
    """Why a file that torch.save wrote is refused: names what is in the way, and what to do."""
    state = f"{file.with_suffix('')}-state.pt"
    if "TorchScript" in message:
        return (
            f"{file}: is a TorchScript archive; if you trust the file, convert it: "
            f"model = torch.jit.load({str(file)!r}); torch.save(model.state_dict(), {state!r})"
        )
    refused = re.search(r"GLOBAL ([\w.]+)", message)
    if refused is None:
        reason = message[:200] or ("it ends too early" if file.stat().st_size else "it is empty")
        return f"{file}: neither safetensors nor a state dict without code ({reason})"
    objects = _objects(file)
    if any(name.startswith("torch.nn.modules.") for name, _ in objects):
        name, key = next((o for o in objects if not o[0].startswith(("collections.", "torch._utils."))), objects[0])
        below = "" if key is None else f"[{key!r}]"
        return (
            f"{file}: holds a whole pickled module ({name}), which cannot be read without running code from the file; "
            f"if you trust it, convert it where its package is installed: "
            f"model = torch.load({str(file)!r}, weights_only=False){below}; torch.save(model.state_dict(), {state!r})"
        )
    return (
        f"{file}: holds {refused[1]}, which cannot be read without running code from the file; if you trust it, save "
        f"the state dict alone: checkpoint = torch.load({str(file)!r}, weights_only=False); "
        f"torch.save(checkpoint['state_dict'], {state!r}), with the key that it has there"
    )


def _objects(file: Path) -> list[tuple[str, str | None]]:
    """(class or function, the last string before it) of all that a pickle names; none of it is imported or run."""
    found: list[tuple[str, str | None]] = []
    strings: list[str] = []
    skipped = None
    try:
        with open(file, "rb") as stream:
            pickles: Any = stream
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    pickles = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
            else:
                for _ in range(3):  # a magic number, a version and the machine's kind come first
                    list(pickletools.genops(stream))
                skipped = "module"  # classes of modules are stored with this word before them
            for code, argument, _ in pickletools.genops(pickles):
                if code.name == "GLOBAL":
                    found.append((str(argument).replace(" ", "."), strings[-1] if strings else None))
                elif code.name == "STACK_GLOBAL" and len(strings) > 1:
                    found.append((".".join(strings[-2:]), strings[-3] if len(strings) > 2 else None))
                elif isinstance(argument, str) and argument != skipped:
                    strings.append(argument)
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile, KeyError):
        pass
    return found
