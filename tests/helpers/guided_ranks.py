"""Guided steps on several ranks: what test_guide_wrapped.py runs."""

from __future__ import annotations

import torch
from distributed_metrics import leave
from torch import nn

import debiaskd as dk
from debiaskd.models import SmallNet

N, RANKS = 8, 2
#: (which network, the layer that is guided)
TASKS = (("static", "Input"), ("static", "Final"), ("sync", "body.conv1"))


def batch() -> tuple[torch.Tensor, torch.Tensor, dk.Boxes]:
    images = torch.randn(N, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(N) % 4, dk.Boxes.from_lists([[[1, 2, 6, 3 + i % 5]] for i in range(N)])


def make(task: str) -> nn.Module:
    torch.manual_seed(0)
    model = SmallNet((4, 6), (1, 2), 4)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if task == "sync" else model.eval()


def steps(model: nn.Module, layer: str, images: torch.Tensor, labels: torch.Tensor, boxes: dk.Boxes) -> list[float]:
    """Three steps of the same batch; the squared norm of the gradient of each, which must not change."""
    guide, norms = dk.Guide(model, layer), []
    for _ in range(3):
        model.zero_grad()
        logits, guidance, _ = guide(images, labels, boxes)
        (guidance + 0.1 * nn.functional.cross_entropy(logits, labels)).backward()
        norms.append(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    return norms


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    images, labels, boxes = (each[rank * N // RANKS : (rank + 1) * N // RANKS] for each in batch())
    found = {}
    for task, layer in TASKS:
        model = inner = make(task)
        if task == "static":
            model = nn.parallel.DistributedDataParallel(inner, static_graph=True)
        norms = steps(model, layer, images, labels, boxes)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in inner.parameters()]
        if task == "sync":  # which DistributedDataParallel takes on GPUs only
            for gradient in gradients:
                torch.distributed.all_reduce(gradient)
                gradient /= RANKS
        found[task, layer] = (norms, gradients, dict(inner.named_buffers()))
    torch.save(found, f"{folder}/rank{rank}.pt")
    leave()
