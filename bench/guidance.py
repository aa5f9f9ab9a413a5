"""`python -m bench.guidance`: what guiding a model costs, as ratios to the same training step without guidance.

A step is forward, cross-entropy, backward and SGD, of a ResNet in training mode on random images, each with a box.
Guided, the energy loss of one class an image is added. Steps take turns in a random order each round; what is reported
are medians of one run, and the bytes that autograd keeps from forward to backward. "PyTorch's layers" is the same step
without the layers of `debiaskd.models.second_order`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import debiaskd as dk
from debiaskd.models import batch_statistics
from debiaskd.models.depths import DEPTHS
from debiaskd.models.second_order_calls import CALLS
from debiaskd.utils.files import write_json

from . import environment

Step = Callable[[], None]


def steps_of(
    model: nn.Module, images: Tensor, labels: Tensor, boxes: dk.Boxes, paths: int, only: Sequence[str]
) -> dict[str, Step]:
    """By name, in the order of the table; each has run twice, so that the closed form is decided on."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step(loss: Callable[[], Tensor]) -> Step:
        def run() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return run

    def guided(guide: dk.Guide) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            logits, guidance, _ = guide(images, labels, boxes)
            return F.cross_entropy(logits, labels) + guidance

        return loss

    def by_autograd(guide: dk.Guide) -> dk.Guide:
        guide.use_gradients()
        return guide

    def plain(run: Step) -> Step:
        def step() -> None:
            with pytorch_layers():
                run()

        return step

    steps = {"unguided": step(lambda: F.cross_entropy(model(images), labels))}
    for depth in reversed(DEPTHS):
        if depth == "Final":
            steps["Final, closed form"] = step(guided(dk.Guide(model, weight=1e-3)))
        for method in ("input_x_gradient", "grad_cam"):
            if depth != "Input" or method == "input_x_gradient":
                guide = by_autograd(dk.Guide(model, depth, method, weight=1e-3))
                steps[f"{depth}, {method}"] = step(guided(guide))
                if method == "input_x_gradient":
                    steps[f"{depth}, {method}, PyTorch's layers"] = plain(steps[f"{depth}, {method}"])
    name = f"Mid3, integrated_gradients of {paths}"
    steps[name] = step(guided(dk.Guide(model, "Mid3", "integrated_gradients", weight=1e-3, steps=paths)))
    chosen = {key: run for key, run in steps.items() if key == "unguided" or any(part in key for part in only)}
    for run in chosen.values():
        run()
        run()
    return chosen


@contextmanager
def pytorch_layers() -> Iterator[None]:
    """PyTorch's own convolution, ReLU and max pooling within."""
    before = batch_statistics._HANDLERS
    batch_statistics._HANDLERS = {name: call for name, call in before.items() if name not in CALLS}
    try:
        yield
    finally:
        batch_statistics._HANDLERS = before


def kept_bytes(step: Step) -> int:
    """What autograd saves for backward during a step, each piece of memory once."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values())


def measure(
    name: str, batch: int, size: int, rounds: int, paths: int, device: str, only: Sequence[str], clock: str
) -> dict[str, Any]:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=20).to(device).train()
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.arange(batch, device=device) % 20
    boxes = dk.Boxes.from_lists([[[size // 8, size // 8, size // 2, size // 2]]] * batch).to(device)
    steps = steps_of(model, images, labels, boxes, paths, only)
    now = time.process_time if clock == "cpu" else time.perf_counter
    use = environment.CpuUse()
    times: dict[str, list[float]] = {key: [] for key in steps}
    order = list(steps)
    for _ in range(rounds):
        random.shuffle(order)
        for key in order:
            begin = now()
            steps[key]()
            if device == "cuda":
                torch.cuda.synchronize()
            times[key].append(now() - begin)
    others = use.share_of_others()
    base, memory = statistics.median(times["unguided"]), {key: kept_bytes(run) for key, run in steps.items()}
    rows = [
        {
            "step": key,
            "time": statistics.median(taken) / base,
            "low": min(taken) / base,
            "high": max(taken) / base,
            "kept": memory[key] / memory["unguided"],
        }
        for key, taken in times.items()
    ]
    run = {"model": name, "batch": batch, "size": size, "rounds": rounds, "clock": clock}
    return {**run, "cpu_share_of_others": others, "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.guidance", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18:16", "resnet50:8"], metavar="NAME:BATCH")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--paths", type=int, default=4, help="points of integrated gradients (default 4)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default 2)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="only steps whose name contains one of these, and unguided",
    )
    parser.add_argument(
        "--clock", default="wall", choices=("wall", "cpu"), help="cpu: processor time, for a machine that others use"
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes; nothing is written without it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    record = environment.describe(options.device, memory_kept=False)
    device = record["device"].lower().replace(" ", "-")
    path = None if options.out is None else options.out / f"guidance-{device}-{record['date']}.json"
    results = []
    for entry in options.models:
        name, _, batch = entry.partition(":")
        how = (options.size, options.rounds, options.paths, options.device, options.only, options.clock)
        results.append(measure(name, int(batch or 8), *how))
        for row in results[-1]["rows"]:
            print(f"{name:12} {row['step']:34} {row['time']:6.3f} x time  {row['kept']:6.3f} x kept", flush=True)
        if path is not None:  # after each network: a run that is stopped keeps what it has measured
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"environment": record, "results": results})
            print(path, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
