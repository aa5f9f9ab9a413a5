"""What the quickstart compares: each method as a function from what all share to a model and its loss.

All students have the same architecture, initial weights, order of samples, schedule and selection. Another method is
another entry of `METHODS`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from debiaskd.boxes import Boxes
from debiaskd.cli.quickstart_loop import Loss, Schedule, fit, in_batches, to_float
from debiaskd.data import Batch
from debiaskd.data.sources import digits
from debiaskd.models.frozen_teacher import FrozenTeacher
from debiaskd.models.transplant import transplant
from debiaskd.models.zoo.small import SmallNet
from debiaskd.reweight import error_weights, predict_correct
from debiaskd.terms import (
    TERMS,
    BackdoorOptions,
    Draws,
    GuideOptions,
    GuideTerm,
    KdOptions,
    MatchOptions,
    Outputs,
    Ranks,
    RelationOptions,
    SampleOptions,
    Setting,
    SupervisedOptions,
    Term,
    TermOptions,
    make_guide,
)
from debiaskd.training.feature_extraction import FeatureExtractor, find_feature_layers
from debiaskd.training.learner import Learner, Step
from debiaskd.training.teacher_outputs import InMemoryTeacher


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers, but for the seeds. All students share `student_schedule`.
    Weights of terms, and whether the combination reweights CID's, were chosen by validation's worst group, few of them
    tried (0.1 to 3; 1 and 10)."""

    train: int = 5000
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
    sample_weight: float = 10.0
    relation_weight: float = 1.0
    intervention_epoch: int = 2
    combined_guidance_weight: float = 0.3
    combined_cid_weight: float = 0.1


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
    def teacher_outputs(self) -> Outputs:
        """The frozen teacher's answers to the training pictures, which never change."""
        frozen = FrozenTeacher(self.teacher)
        with torch.no_grad():
            parts = [frozen(part) for part in self.images.split(500)]
            feature = torch.cat([part[0] for part in parts]).contiguous(memory_format=torch.channels_last)
            pooled = in_batches(lambda part: frozen.forward_head(part, pre_logits=True), feature)
        return Outputs(feature, pooled, torch.cat([part[1] for part in parts]))

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


class Taught(Learner):
    """A student with the terms that train it, over pictures that lie in memory.

    It speaks timm's protocol for what it deploys: the student, or the student with what a term adds to it.

    Args:
        context, student: see there.
        terms: options by name, as in a recipe.
        weight: [N] of the training pictures, or None.
    """

    def __init__(
        self, context: Context, student: nn.Module, terms: Mapping[str, TermOptions], weight: Tensor | None = None
    ) -> None:
        self.labels, self.epoch = context.labels, 0
        classes, example = len(digits.LABELS), context.images[:2]
        wanted = {need.partition(".")[2] for name in terms for need in TERMS[name].needs if need.startswith("student.")}
        at = find_feature_layers(student, example) if wanted else None
        taught = any(need.startswith("teacher.") for name in terms for need in TERMS[name].needs)
        width = context.settings.teacher_widths[-1]
        setting = Setting(classes, False, len(digits.GROUPS), 0 if at is None else at.pooled_width, width)
        guide, self.boxes = None, Boxes.from_lists([None] * len(self.labels))
        made: dict[str, Term] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.generator("terms").initial_seed())
            for name, options in terms.items():
                if isinstance(options, GuideOptions):
                    guide, self.boxes = make_guide(options, student), context.few_boxes
                    made[name] = GuideTerm(options, guide)
                else:
                    made[name] = TERMS[name](options, setting)  # type: ignore[call-arg]
        teacher = InMemoryTeacher(context.teacher_outputs) if taught else None
        super().__init__(FeatureExtractor(student, at, wanted), made, teacher=teacher, guide=guide, weight=weight)
        self.draws, self.ranks = Draws(context.seed, 0, Ranks(), torch.device("cpu")), Ranks()

    def loss(self, images: Tensor, index: Tensor) -> Tensor:
        """Of the training pictures of these numbers."""
        batch = Batch(images, self.labels[index], self.boxes[index], index=index)
        total: Tensor = super().forward(Step(batch, self.epoch, self.draws, self.ranks))[0]
        return total

    def epoch_ended(self) -> None:
        """After the last step of an epoch."""
        self.end_epoch(self.epoch, self.ranks)
        self.epoch += 1

    def forward_features(self, images: Tensor) -> Tensor:
        return self.deployed().forward_features(images)  # type: ignore[operator, no-any-return]

    def forward_head(self, feature: Tensor, pre_logits: bool = False) -> Tensor:
        return self.deployed().forward_head(feature, pre_logits)  # type: ignore[operator, no-any-return]

    def get_classifier(self) -> nn.Linear:
        return self.deployed().get_classifier()  # type: ignore[operator, no-any-return]

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        logits: Tensor = self.deployed()(images)
        return logits


def label_loss(labels: Tensor) -> Loss:
    return lambda model, images, index: F.cross_entropy(model(images), labels[index])


@dataclass(frozen=True)
class Method:
    """How one student is made: `build` gives its model and its loss."""

    name: str
    description: str
    build: Callable[[Context], tuple[nn.Module, Loss]]


def _taught(
    context: Context, student: nn.Module, terms: Mapping[str, TermOptions], weight: Tensor | None = None
) -> tuple[nn.Module, Loss]:
    return Taught(context, student, terms, weight), lambda model, images, index: model.loss(images, index)


def _erm(context: Context) -> tuple[nn.Module, Loss]:
    return _taught(context, context.student(), {"supervised": SupervisedOptions()})


def _kd(context: Context) -> tuple[nn.Module, Loss]:
    return _taught(context, context.student(), {"kd": KdOptions(temperature=context.settings.temperature)})


def _simkd(context: Context) -> tuple[nn.Module, Loss]:
    return _taught(context, context.transplanted(), {"match": MatchOptions()})


def _dett(context: Context) -> tuple[nn.Module, Loss]:
    weight = error_weights(context.correct, context.settings.up)
    return _taught(context, context.transplanted(), {"match": MatchOptions()}, weight)


def _guided(context: Context) -> tuple[nn.Module, Loss]:
    terms = {"supervised": SupervisedOptions(), "guide": GuideOptions(weight=context.settings.guidance_weight)}
    return _taught(context, context.student(), terms)


def _cid(context: Context) -> tuple[nn.Module, Loss]:
    return _taught(context, context.student(), _cid_terms(context.settings))


def _all(context: Context) -> tuple[nn.Module, Loss]:
    settings = context.settings
    terms = {
        "match": MatchOptions(),
        "guide": GuideOptions(weight=settings.combined_guidance_weight),
        **_cid_terms(settings, settings.combined_cid_weight, weighted=True),
    }
    return _taught(context, context.transplanted(), terms, error_weights(context.correct, settings.up))


def _cid_terms(settings: Settings, factor: float = 1.0, *, weighted: bool = False) -> dict[str, TermOptions]:
    temperature, start = settings.temperature, settings.intervention_epoch
    return {
        "kd": KdOptions(weight=factor, temperature=temperature, weighted=weighted),
        "sample": SampleOptions(weight=factor * settings.sample_weight, weighted=weighted),
        "relation": RelationOptions(weight=factor * settings.relation_weight),
        "backdoor": BackdoorOptions(weight=factor, start=start, temperature=temperature, weighted=weighted),
    }


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
    Method(
        "cid",
        "The student imitates the teacher's logits, its features, and how pictures of a class resemble each other; "
        "logits adjusted for the classes' contexts (Deng & Zhang 2021).",
        _cid,
    ),
    Method(
        "dett+guided+cid",
        "As dett, with the evidence guided into the known boxes and CID's terms beside, their weights made smaller; "
        "pictures that dett counts more count more for these, too.",
        _all,
    ),
)
