"""One training of `bench.peers`: its networks, images, optimiser and clock, the same for all that are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

CLASSES, WORKERS, TEMPERATURE = 10, 2, 4.0
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Session:
    """One training.

    Attributes:
        teacher, student: timm's names.
        size: side of the images.
        batch, images, epochs: numbers; the images fill the batches.
        jpegs: folder with train/CLASS/*.jpg.
        prepared: the same images after `debiaskd prepare`.
        weights: safetensors file of the teacher.
        out: an empty folder.
        device: "cpu" or "cuda".
    """

    teacher: str
    student: str
    size: int
    batch: int
    images: int
    epochs: int
    jpegs: Path
    prepared: Path
    weights: Path
    out: Path
    device: str


Provider = Callable[[Session], list[float]]


def teacher_of(session: Session) -> nn.Module:
    import timm
    from safetensors.torch import load_file

    made: nn.Module = timm.create_model(session.teacher, num_classes=CLASSES)
    made.load_state_dict(load_file(session.weights))
    return made.to(session.device).eval().requires_grad_(False)


def student_of(session: Session) -> nn.Module:
    import timm

    torch.manual_seed(0)
    made: nn.Module = timm.create_model(session.student, num_classes=CLASSES)
    return made.to(session.device).train()


def transform(size: int) -> Any:
    from torchvision import transforms

    steps = [transforms.Resize((size, size)), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    return transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])


def images_of(session: Session) -> DataLoader[Any]:
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(str(session.jpegs / "train"), transform(session.size))
    pin = session.device == "cuda"
    return DataLoader(
        folder,
        session.batch,
        shuffle=True,
        num_workers=WORKERS,
        drop_last=True,
        pin_memory=pin,
        persistent_workers=True,
    )


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)


def epochs_of(session: Session, epoch: Callable[[int], None]) -> list[float]:
    seconds = []
    for number in range(session.epochs):
        started = time.perf_counter()
        epoch(number)
        if session.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds
