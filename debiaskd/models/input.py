"""Input contracts: channels, size, mean, standard deviation and interpolation of a network's input.

Where a network's contract comes from is in `debiaskd.models.input_sources`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from debiaskd.models.weight_files import weights_file

#: Of ImageNet's pixels in 0..1, what most weights were trained with.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class InputContract:
    """The input contract of a network.

    Attributes:
        size: (height, width) in pixels.
        mean, std: of the pixels in 0..1, one number for each of red, green, blue.
        interpolation: interpolation for images of another size: "nearest", "bilinear", "bicubic", the latter two with
            antialiasing.
        channels: 3, or 6: the pixels, then 1 minus the pixels (B-cos networks).

    Example:
        >>> contract = InputContract((224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> str(contract)
        '3×224×224, mean 0.5, std 0.5, bilinear'
        >>> InputContract.from_dict(contract.to_dict()) == contract
        True
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    channels: int = 3

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "channels": self.channels,
            "size": list(self.size),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> InputContract:
        height, width = document["size"]
        mean, std = tuple(document["mean"]), tuple(document["std"])
        return cls((height, width), mean, std, document["interpolation"], document["channels"])

    def same_as(self, other: InputContract, *, resized: bool = True) -> bool:
        """Whether two networks read the same tensor. Interpolation matters only where images are `resized`."""
        mine = self if resized else replace(self, interpolation=other.interpolation)
        return mine == other

    def example(self, count: int = 1) -> Tensor:
        """Random input [count, channels, *size] in 0..1, the same every time, for trial runs."""
        return torch.rand(count, self.channels, *self.size, generator=torch.Generator().manual_seed(0))

    def __str__(self) -> str:
        normalisation = "in 0..1 with their inverses" if self.channels == 6 else ""
        if not normalisation:
            normalisation = f"mean {_numbers(self.mean)}, std {_numbers(self.std)}"
        return f"{self.channels}×{self.size[0]}×{self.size[1]}, {normalisation}, {self.interpolation}"


class Preprocess(nn.Module):
    """Convert images to the input of a network with this contract. It can be exported with the network.

    Args:
        contract: the input contract.

    Its input is [N,3,H,W], uint8 in 0..255 or floating point in 0..1; its output is floating point
    [N,channels,*size]. If H×W is the contract's size, nothing is resized.

    Example:
        >>> preprocess = Preprocess(InputContract((32, 32)))
        >>> preprocess(torch.zeros(2, 3, 48, 64, dtype=torch.uint8)).shape
        torch.Size([2, 3, 32, 32])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, contract: InputContract) -> None:
        super().__init__()
        self.contract = contract
        for name in ("mean", "std"):
            values = torch.tensor(getattr(contract, name))[:, None, None]
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images if images.is_floating_point() else images.float() / 255
        if pixels.shape[-2:] != self.contract.size:
            pixels = resize(pixels, self.contract.size, self.contract.interpolation)
        pixels = (pixels - self.mean) / self.std
        return with_inverse(pixels) if self.contract.channels == 6 else pixels


def resize(pixels: Tensor, size: tuple[int, int], interpolation: str = "bilinear", *, top: float = 1.0) -> Tensor:
    """Images [N,C,H,W] with values in [0, top] resized to [N,C,*size]; what bicubic interpolation overshoots is
    clipped, as by PIL."""
    if interpolation == "nearest":
        return F.interpolate(pixels, size, mode="nearest-exact")
    found = F.interpolate(pixels, size, mode=interpolation, antialias=True)
    return found.clamp(0, top) if interpolation == "bicubic" else found


def inverse_added(name: str) -> bool:
    """Whether the network reads six channels, each image with its inverse, and pixels in 0..1 (B-cos)."""
    return name.startswith("bcos/")


def with_inverse(images: Tensor) -> Tensor:
    """[N,3,H,W] in 0..1 to [N,6,H,W]."""
    return torch.cat([images, 1 - images], 1)


# -- with weights -----------------------------------------------------------------------------------------------------


def default_contract(name: str, size: tuple[int, int]) -> InputContract:
    """ImageNet's, or that of B-cos networks: what a network reads when nothing says otherwise, and what the networks of
    runs without a saved contract were trained with."""
    if inverse_added(name):
        return InputContract(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), channels=6)
    return InputContract(size)


def saved(file: Path, name: str) -> InputContract | None:
    """The contract that was saved with weights by `debiaskd train`; the default's of a run of before there were any;
    None for weights that come from elsewhere, or that cannot be read."""
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        return None
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get("debiaskd")
        return None if text is None else of_weights(json.loads(text), name)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def read_contract(path: Path | str) -> InputContract:
    """Read the contract that `debiaskd train` saved with weights.

    Args:
        path: the folder of a run, for its student; a stage's folder; or a `.safetensors` file.

    Raises:
        OSError: there is no such file.
        ValueError: it is not a safetensors file, or has no contract.

    Example:
        >>> import tempfile
        >>> from debiaskd.models.weight_files import save_weights
        >>> about = {"input": InputContract((48, 48)).to_dict()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(nn.Linear(2, 1), Path(folder, "model.safetensors"), about)
        ...     print(read_contract(folder))
        3×48×48, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225), bilinear
    """
    from safetensors import SafetensorError, safe_open

    file = weights_file(path)
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("debiaskd", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{file}: no safetensors file ({error})") from None
    if about.get("input") is None:
        raise ValueError(
            f"{file}: has no input contract; weights that debiaskd wrote before there were any read ImageNet's mean "
            "and std, or six channels for B-cos"
        )
    return InputContract.from_dict(about["input"])


def of_weights(about: Mapping[str, Any], name: str, key: str = "input") -> InputContract:
    """The contract in what a run's weights say of themselves (`metadata()["debiaskd"]`)."""
    if about.get(key) is not None:
        return InputContract.from_dict(about[key])
    return default_contract(name, (about["size"], about["size"]))


def _numbers(values: Sequence[float]) -> str:
    shown = [f"{value:.4g}" for value in values]
    return shown[0] if len(set(shown)) == 1 else f"({', '.join(shown)})"
