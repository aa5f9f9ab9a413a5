"""Write the weights of a classification head into a network's last layers.

A safetensors file gives the head as `weight` [K,D] and, if it has one, `bias` [K]: for example, scaled zero-shot text
embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.models.last_layers import Reading, last_layers, reading
from debiaskd.models.modules import share
from debiaskd.models.registry import NetworkError
from debiaskd.recipe import RecipeError


def from_file(model: nn.Module, example: Tensor, path: str) -> None:
    """Write the head of a file into a model's last layers.

    Raises:
        RecipeError: no such file, no such tensors, of other shapes, or layers that cannot hold it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RecipeError(
            f"teacher.head: {path}: not readable as safetensors ({' '.join(str(error).split())})"
        ) from None
    r, (z, _, logits) = find_head(model, example)
    shape = [logits.shape[1], z.shape[1]]
    weight, bias = found.get("weight"), found.get("bias")
    if weight is None or list(weight.shape) != shape:
        got = f"tensors {sorted(found)}" if weight is None else f"{list(weight.shape)}"
        raise RecipeError(f"teacher.head: {path}: must hold weight [K,D]={shape}, got {got}")
    if bias is not None and list(bias.shape) != shape[:1]:
        raise RecipeError(f"teacher.head: {path}: bias must be [K]={shape[:1]}, got {list(bias.shape)}")
    put(model, r, example, weight, bias)


def check(model: nn.Module, example: Tensor) -> None:
    """Raises RecipeError if a model's last layers cannot hold a head that is fitted."""
    r, (z, _, logits) = find_head(model, example)
    put(share(model), r, example, torch.zeros(logits.shape[1], z.shape[1]), None, dry=True)


def find_head(model: nn.Module, example: Tensor) -> tuple[Reading, tuple[Tensor, list[Tensor], Tensor]]:
    """(the model's last layers, what they compute on a random batch: see `debiaskd.models.last_layers.reading`).

    Raises:
        RecipeError: a network whose last layers cannot be told.
    """
    copied = share(model).eval()
    try:
        r = last_layers("teacher", copied, example)
        batch = torch.rand(3, *example.shape[1:], generator=torch.Generator().manual_seed(4)).to(example)
        return r, reading(copied, r, batch)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"teacher.head: {error}") from None


def linear_layers(model: nn.Module, r: Reading) -> list[Any]:
    """The last layers as modules; raises RecipeError if one is not linear."""
    found = [model.get_submodule(name) for name in r.names]
    for layer in found:
        if not isinstance(layer, nn.Linear) and not (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)):
            raise RecipeError(
                f"teacher.head: a head can be put into linear layers and 1×1 convolutions, {type(model).__name__} ends "
                f"in {type(layer).__name__}"
            )
    return found


@torch.no_grad()
def put(
    model: nn.Module, r: Reading, example: Tensor, weight: Tensor, bias: Tensor | None, *, dry: bool = False
) -> None:
    """Makes `W z + b` the logits of a model whose last layers these are, whether one, or a sum of several.

    Raises:
        RecipeError: that is not what they make; a bias, and a layer without one. `dry`: only that.
    """
    layers = linear_layers(model, r)
    batch = torch.rand(3, *example.shape[1:], generator=torch.Generator().manual_seed(4)).to(example)
    z, outputs, logits = reading(model.eval(), r, batch)
    scale = r.scale_for(outputs, logits)
    same = torch.allclose((scale[:, None, None] * torch.stack(outputs)).sum(0), logits, rtol=1e-3, atol=1e-4)
    if not same or not bool((scale.abs() > 1e-6).all()):
        raise RecipeError(
            f"teacher.head: {type(model).__name__} computes more behind its last layers: no head fits there"
        )
    if bias is not None and any(layer.bias is None for layer in layers):
        raise RecipeError("teacher.head: a bias, and the network's last layer has none")
    if dry:
        return
    parts = weight.split([shape.numel() for shape in r.distinct_shapes], 1)
    for layer, i, factor in zip(layers, r.reads, scale):
        layer.weight.copy_((parts[i] / (factor * r.reads.count(i)).cpu()).reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(torch.zeros(len(weight)) if bias is None else bias / (factor * len(layers)).cpu())
    expected = z.cpu().float() @ weight.float().T + (0 if bias is None else bias)
    if not torch.allclose(reading(model, r, batch)[2].cpu().float(), expected, rtol=1e-2, atol=1e-3):
        raise NetworkError("teacher.head: the head that was put into the network does not give its logits")
