"""`python -m bench.own_maps`: how far maps in training mode are from each image's own, by the size of the batch.

An image's own map is the gradient of its logit alone, by one backward pass an image (`statistics="own"`). Compared with
it: the map that holds the batch's statistics constant (`dk.Guide`), and the gradient of all logits' sum through
PyTorch's batch norm, which mixes the images. Distances are norms of the difference of a batch's maps over that of the
own maps; a ResNet of timm with random weights, random images.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import debiaskd as dk
from debiaskd.attribution import input_x_gradient
from debiaskd.models.depths import find
from debiaskd.models.wrappers import output_of

from . import environment


def mixed(model: nn.Module, layer: str, images: Tensor, target: Tensor) -> Tensor:
    name = find(model, layer, images).module
    assert name is not None
    with output_of(model.get_submodule(name), watch=True) as caught:
        logits = model(images)
    return input_x_gradient(logits, caught[0], target)


def distances(model: nn.Module, layer: str, batch: int, size: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    images, target = torch.randn(batch, 3, size, size, generator=generator), torch.arange(batch) % 10
    own = dk.Guide(model, layer, statistics="own").attribute(images, target)
    maps = {"constant": dk.Guide(model, layer).attribute(images, target), "mixed": mixed(model, layer, images, target)}
    found = {name: float((each.detach() - own).norm() / own.norm()) for name, each in maps.items()}
    return {"layer": layer, "batch": batch, **found}


def main(arguments: list[str] | None = None) -> int:
    import timm

    parser = argparse.ArgumentParser(prog="python -m bench.own_maps", description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--layers", nargs="+", default=["Mid3"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32, 128])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default 2)")
    parser.add_argument("--out", type=Path, help="folder for the JSON; nothing is written without it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, rows = timm.create_model(options.model, num_classes=10).train(), []
    for layer in options.layers:
        for batch in options.batches:
            rows.append(distances(model, layer, batch, options.size))
            row = rows[-1]
            print(f"{layer:6} batch {batch:4}: constant {row['constant']:.4f}, mixed {row['mixed']:.4f}", flush=True)
    if options.out is not None:
        record = environment.describe("cpu", memory_kept=False)
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"own-maps-cpu-{record['date']}.json"
        document = {"environment": record, "model": options.model, "size": options.size, "rows": rows}
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
