"""What the quickstart compares: each method as a function from what all share to a model and its loss.

All students have the same architecture, initial weights, order of samples, schedule and selection. Another method is
another entry of `METHODS`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from debiaskd.boxes import Boxes
from debiaskd.data import digits
from debiaskd.guide import Guide
from debiaskd.models import SmallNet
from debiaskd.ops.feature_match import feature_match_loss
from debiaskd.ops.kd import kd_loss
from debiaskd.reweight import error_weights, predict_correct
from debiaskd.train import Loss, Schedule, fit, to_float
from debiaskd.transplant import FrozenTeacher, transplant


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers, but for the seeds. All students share `student_schedule`."""

    train: int = 6000
    validation: int = 1000
    test: int = 2000
    size: int = 48
    agreement: float = 0.95
    teacher_widths: tuple[int, ...] = (24, 48, 96, 96)
    student_widths: tuple[int, ...] = (8, 16, 32, 32)
    strides: tuple[int, ...] = (2, 2, 2, 1)
    projector: str = "depthwise"
    teacher_schedule: Schedule = field(default_factory=lambda: Schedule(epochs=6))
    student_schedule: Schedule = field(default_factory=lambda: Schedule(epochs=10))
    identification_schedule: Schedule = field(default_factory=lambda: Schedule(epochs=1))
    temperature: float = 4.0
    up: float = 50.0
    annotated_fraction: float = 0.1
    guidance_weight: float = 0.1


class Context:
    """What the methods of one seed share. What only some need is computed when it is first asked for."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self.data = digits.load(
            seed,
            train=settings.train,
            validation=settings.validation,
            test=settings.test,
            size=settings.size,
            agreement=settings.agreement,
        )
        self.images = to_float(self.data.train.images)
        self.labels = self.data.train.labels
        self.validation_images = to_float(self.data.validation.images)
        self.test_images = to_float(self.data.test.images)
        #: Trained before any method is built.
        self.teacher = self.network(settings.teacher_widths, "teacher")

    def generator(self, purpose: str) -> torch.Generator:
        """Random numbers of their own for each purpose, so that no model's depend on what was trained before it."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{purpose}".encode()))

    def network(self, widths: Sequence[int], purpose: str) -> SmallNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.generator(purpose).initial_seed())
            return SmallNet(widths, self.settings.strides, len(digits.LABELS))

    def student(self) -> SmallNet:
        """A fresh student, every time with the same initial weights."""
        return self.network(self.settings.student_widths, "student")

    def transplanted(self) -> nn.Module:
        """The student's body behind a projector, with the teacher's frozen last layer."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.generator("projector").initial_seed())
            return transplant(self.teacher, self.student(), projector=self.settings.projector)

    @cached_property
    def teacher_outputs(self) -> tuple[Tensor, Tensor]:
        """The frozen teacher's feature maps [N,C,H,W] and logits [N,K] of the training pictures, which never change."""
        frozen = FrozenTeacher(self.teacher)
        with torch.no_grad():
            parts = [frozen(part) for part in self.images.split(500)]
        feature = torch.cat([part[0] for part in parts]).contiguous(memory_format=torch.channels_last)
        return feature, torch.cat([part[1] for part in parts])

    @cached_property
    def few_boxes(self) -> Boxes:
        """The training pictures' boxes, known for a few of them: drawn at random, whatever their group."""
        count = len(self.labels)
        drawn = torch.randperm(count, generator=self.generator("annotation"))
        chosen = drawn[: round(self.settings.annotated_fraction * count)]
        where = torch.zeros(count, dtype=torch.bool).index_fill_(0, chosen, True)
        return self.data.train.boxes.annotated_where(where)

    @cached_property
    def correct(self) -> Tensor:
        """bool [N]: which training pictures a briefly, plainly trained student gets right. No group is looked at."""
        model = self.network(self.settings.student_widths, "identification")
        schedule, generator = self.settings.identification_schedule, self.generator("identification")
        fit(model, self.images, label_loss(self.labels), schedule, generator=generator)
        return predict_correct(model, zip(self.images.split(500), self.labels.split(500)))


def label_loss(labels: Tensor) -> Loss:
    return lambda model, images, index: F.cross_entropy(model(images), labels[index])


def distillation_loss(logits: Tensor, temperature: float) -> Loss:
    """The student's softened predictions pulled to those of the teacher's logits [N,K]."""
    return lambda model, images, index: kd_loss(model(images), logits[index], temperature=temperature)


def match_loss(feature: Tensor, weight: Tensor | None = None) -> Loss:
    """The distance to the teacher's feature maps [N,C,H,W], weighted by [N]."""

    def loss(model: nn.Module, images: Tensor, index: Tensor) -> Tensor:
        student: Tensor = model.forward_features(images)  # type: ignore[operator]
        return feature_match_loss(student, feature[index], None if weight is None else weight[index])

    return loss


def guided_loss(guide: Guide, labels: Tensor, boxes: Boxes) -> Loss:
    """The labels' cross-entropy, with the label's evidence pulled into the boxes that are known."""

    def loss(model: nn.Module, images: Tensor, index: Tensor) -> Tensor:
        logits, guidance, _ = guide(images, labels[index], boxes[index])
        return F.cross_entropy(logits, labels[index]) + guidance

    return loss


@dataclass(frozen=True)
class Method:
    """How one student is made: `build` gives its model and its loss."""

    name: str
    description: str
    build: Callable[[Context], tuple[nn.Module, Loss]]


def _erm(context: Context) -> tuple[nn.Module, Loss]:
    return context.student(), label_loss(context.labels)


def _kd(context: Context) -> tuple[nn.Module, Loss]:
    return context.student(), distillation_loss(context.teacher_outputs[1], context.settings.temperature)


def _simkd(context: Context) -> tuple[nn.Module, Loss]:
    return context.transplanted(), match_loss(context.teacher_outputs[0])


def _dett(context: Context) -> tuple[nn.Module, Loss]:
    weight = error_weights(context.correct, context.settings.up)
    return context.transplanted(), match_loss(context.teacher_outputs[0], weight)


def _guided(context: Context) -> tuple[nn.Module, Loss]:
    student = context.student()
    guide = Guide(student, weight=context.settings.guidance_weight)
    return student, guided_loss(guide, context.labels, context.few_boxes)


METHODS = (
    Method("erm", "The student trained on the labels alone (cross-entropy); no teacher.", _erm),
    Method("kd", "The student imitates the teacher's softened logits (Hinton et al. 2015).", _kd),
    Method(
        "simkd",
        "The student imitates the teacher's last feature map and takes over its frozen last layer (Chen et al. 2022).",
        _simkd,
    ),
    Method(
        "dett",
        "As simkd, but pictures that a briefly and plainly trained student gets wrong count more (Lee & Lee 2023). "
        "Never told a picture's group.",
        _dett,
    ),
    Method(
        "guided",
        "As erm, with the evidence for the label pulled into the digits' boxes, of which a tenth are known "
        "(Rao et al. 2023, energy loss at the last feature map). No teacher.",
        _guided,
    ),
)
