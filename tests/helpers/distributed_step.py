"""One training step of a small student, with every loss or guided: what test_distributed.py runs on several ranks."""

from __future__ import annotations

import torch
from distributed_metrics import leave
from torch import nn

import debiaskd as dk
from debiaskd.models import SmallNet


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)
        self.context_head = nn.Linear(6 + 5, 4)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        feature = self.features(pictures).relu()
        pooled = feature.mean((2, 3))
        logits = self.head(pooled)
        context = torch.arange(20, dtype=torch.float32).reshape(4, 5) / 20
        weight, bias = self.context_head.weight, self.context_head.bias
        adjusted = dk.backdoor_logits(pooled, logits, context, weight, bias, mode="exact")
        return feature, pooled, logits, adjusted


def batch(rank: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rank)
    pictures = torch.randn(8, 3, 10, 10, generator=generator)
    teacher = torch.randn(8, 6, 10, 10, generator=generator)
    return pictures, teacher, torch.arange(8) % 4


def loss(student: nn.Module, rank: int) -> torch.Tensor:
    pictures, teacher, labels = batch(rank)
    feature, pooled, logits, adjusted = student(pictures)
    boxes = dk.Boxes.from_lists([[[1, 2, 6, 9]], [], None, [[0, 0, 3, 3], [2, 2, 9, 9]]] * 2)
    head = student.module.head if hasattr(student, "module") else student.head
    attribution = dk.channel_dot(head.weight[labels], feature)
    return (
        dk.feature_match_loss(feature, teacher, torch.linspace(1, 3, 8))
        + dk.energy_loss(attribution, boxes)
        + dk.class_relation_loss(pooled, teacher.mean((2, 3)), labels)
        + dk.kd_loss(logits, teacher.mean((2, 3))[:, :4])
        + nn.functional.cross_entropy(adjusted, labels)
    )


def guided_loss(student: nn.Module, rank: int) -> torch.Tensor:
    """At the image and in the middle by gradients, where the graph is of second order; at the end in closed form."""
    pictures, _, labels = batch(rank)
    boxes = dk.Boxes.from_lists([[[1, 2, 6, 9]], [], None, [[0, 0, 3, 3], [2, 2, 9, 9]]] * 2)
    total = torch.zeros(())
    for layer in ("Input", "body.conv1", "Final"):
        logits, loss, _ = dk.Guide(student, layer)(pictures, labels, boxes)
        total = total + loss + nn.functional.cross_entropy(logits, labels)
    return total


def make_student() -> Student:
    torch.manual_seed(0)
    return Student()


def make_guided() -> nn.Module:
    torch.manual_seed(0)
    return SmallNet((4, 6), (1, 2), 4).eval()  # batch norm in training knows of its own rank alone


TASKS = {"losses": (make_student, loss), "guided": (make_guided, guided_loss)}


def run(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    gradients = {}
    for task, (make, task_loss) in TASKS.items():
        student = nn.parallel.DistributedDataParallel(make())
        task_loss(student, rank).backward()
        gradients[task] = [p.grad for p in student.parameters()]
    torch.save(gradients, f"{folder}/rank{rank}.pt")
    leave()
