"""Every metric on one of several ranks: what test_metrics_over_ranks runs."""

from __future__ import annotations

import os
from typing import Any

import torch

from debiaskd import Boxes, metrics

RANKS = 2
LABELS = 3


def samples(rank: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rank)
    count = 7 + 4 * rank
    start = torch.randint(10, (count, 2), generator=generator)
    corners = torch.cat([start, start + torch.randint(1, 9, (count, 2), generator=generator)], 1)
    return {
        "maps": torch.randn(count, 5, 5, generator=generator) - rank / 2,
        "boxes": Boxes.from_lists([None if i == 3 else [row] for i, row in enumerate(corners.tolist())]),
        "logits": torch.rand(count, LABELS, generator=generator) * (2 if rank else 1) - rank / 2,
        "targets": torch.randint(2, (count, LABELS), generator=generator),
        "correct": torch.rand(count, generator=generator) < 0.6,
        "groups": torch.randint(4, (count,), generator=generator),
    }


def computed(ranks: tuple[int, ...]) -> dict[str, Any]:
    energy = metrics.EnergyPointingGame(bins=(0.1, 0.2), size=(16, 16))
    chosen, fixed = metrics.BoxIoU(size=(16, 16)), metrics.BoxIoU(0.5, size=(16, 16))
    f1, each_f1 = metrics.MultilabelF1(LABELS), metrics.MultilabelF1(LABELS, "none")
    precision = metrics.MultilabelMeanAveragePrecision(LABELS)
    uneven = metrics.MultilabelMeanAveragePrecision(LABELS)  # the second rank gets no batch
    accuracy = metrics.GroupAccuracy(torch.tensor([0, 0, 0, 1, 2, 3]))
    for rank in ranks:
        given = samples(rank)
        for metric in (energy, chosen, fixed):
            metric.update(given["maps"], given["boxes"])
        for metric in (f1, each_f1, precision):
            metric.update(given["logits"], given["targets"])
        if rank == 0:
            uneven.update(given["logits"], given["targets"])
        accuracy.update(given["correct"], given["groups"])
    found = {"energy": energy, "chosen": chosen, "fixed": fixed, "f1": f1, "each_f1": each_f1}
    found |= {"precision": precision, "uneven": uneven, "accuracy": accuracy}
    return {name: metric.compute() for name, metric in found.items()} | {
        "threshold": chosen.best_threshold(),
        "classes": precision.classes(),
        "uneven_classes": uneven.classes(),
    }


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    torch.save(computed((rank,)), f"{folder}/metrics{rank}.pt")
    leave()


def leave() -> None:
    """Ends this process at once: a thread of Gloo's that still lets go of its last tensor while Python shuts down would
    abort it (pytorch/pytorch#179291)."""
    torch.distributed.destroy_process_group()
    os._exit(0)
