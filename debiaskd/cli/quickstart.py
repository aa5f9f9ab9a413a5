"""The main job: a debiased teacher, and students distilled from it by several methods, on pictures with a shortcut.

Runs on the CPU. The same settings, seed and number of threads give the same numbers bit for bit, and a method's
numbers do not depend on which others run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from debiaskd.attribution.guide import Guide
from debiaskd.cli import doctor
from debiaskd.cli.quickstart_loop import Fitted, fit, in_batches
from debiaskd.cli.quickstart_methods import METHODS, Context, Method, Settings, label_loss
from debiaskd.data.sources import digits
from debiaskd.metrics import energy_in_box, group_accuracy
from debiaskd.models.heads import count_parameters
from debiaskd.reports import quickstart_table as report
from debiaskd.reports.gallery import Gallery
from debiaskd.reweight import group_weights
from debiaskd.training.learner import Learner

TEACHER = (
    "The wider network that is distilled, trained on the labels and debiased by drawing the four groups of training "
    "pictures equally often. Only its training is told the groups."
)
SELECTION = (
    "For the teacher and every student alike: the epoch with the best worst-group accuracy on the validation pictures, "
    "whose groups are known, and the later of equals. Test pictures decide nothing."
)
#: What an epoch costs beside a student's, so that the progress shown moves evenly.
TEACHER_EPOCH = 3.0


class Progress(Protocol):
    """Called before each model's training and after each of its epochs.

    `task` says what is being trained ("seed 0: dett"); `done` is the share of the whole job that is over, rising
    from 0 to 1. An exception that it raises stops the job.
    """

    def __call__(self, task: str, done: float, /) -> None: ...


@dataclass(frozen=True)
class Results:
    """What a run gives: the content of results.json, and the example pictures of its report."""

    rows: list[dict[str, Any]]
    environment: dict[str, Any]
    settings: dict[str, Any]
    gallery: Gallery

    def document(self) -> dict[str, Any]:
        return {"rows": self.rows, "environment": self.environment, "settings": self.settings}


def run(
    out: Path | str,
    seeds: int | Sequence[int] = 3,
    *,
    methods: Sequence[Method] = METHODS,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Results:
    """Train everything, measure it, and write `out/report.html` and `out/results.json`.

    Both files appear together at the end, complete or not at all; whatever stops the run leaves earlier ones alone.

    Args:
        out: directory, made if it does not exist.
        seeds: how many (0, 1, …), or which.
        methods: the students to train; the teacher always is.
        settings: None: the default ones.
        progress: see `Progress`.

    Raises:
        OSError: `out` cannot be written. Tried before anything is trained.
        ValueError: no seed, or one twice.
        ModuleNotFoundError: scikit-learn, pillow or jinja2 is not installed. Tried likewise.
    """
    settings = settings or Settings()
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds must be at least one, each once, got {seeds!r}")
    report.require()
    target = report.Target(Path(out))
    started = time.perf_counter()
    clock = _Clock(settings, len(chosen), len(methods), progress)
    rows: list[dict[str, Any]] = []
    galleries = []
    for seed in chosen:
        context = Context(settings, seed)
        galleries.append(Gallery.choose(context.data.test, seed))
        rows.append(_teacher(context, clock, galleries[-1]))
        rows.extend(_student(context, method, clock, galleries[-1]) for method in methods)
    results = Results(
        rows,
        {**doctor.environment(), "seconds": round(time.perf_counter() - started, 1)},
        {
            **asdict(settings),
            "seeds": chosen,
            "selection": SELECTION,
            "methods": {"teacher": TEACHER, **{method.name: method.description for method in methods}},
        },
        galleries[0],
    )
    target.write(report.render(results.document(), results.gallery), results.document())
    return results


class _Clock:
    """Counts epochs, in units of a student's, and tells the progress."""

    def __init__(self, settings: Settings, seeds: int, methods: int, progress: Progress | None) -> None:
        students = methods * settings.student_schedule.epochs
        self.total = seeds * (TEACHER_EPOCH * settings.teacher_schedule.epochs + students)
        self.done = 0.0
        self.progress = progress

    def task(self, name: str, cost: float = 1.0) -> Callable[[], None]:
        def tell() -> None:
            if self.progress is not None:
                self.progress(name, min(self.done / self.total, 1.0))

        def on_epoch() -> None:
            self.done += cost
            tell()

        tell()
        return on_epoch


def _teacher(context: Context, clock: _Clock, gallery: Gallery) -> dict[str, Any]:
    on_epoch = clock.task(f"seed {context.seed}: teacher", TEACHER_EPOCH)
    started = time.perf_counter()
    fitted = fit(
        context.teacher,
        context.images,
        label_loss(context.labels),
        context.settings.teacher_schedule,
        generator=context.generator("order"),
        score=lambda model: _validation_score(context, model),
        sampling=group_weights(context.data.train.groups),
        on_epoch=on_epoch,
    )
    _ = context.teacher_outputs  # here, so that its time is not counted as the first student's
    return _row(context, "teacher", context.teacher, fitted, time.perf_counter() - started, gallery)


def _student(context: Context, method: Method, clock: _Clock, gallery: Gallery) -> dict[str, Any]:
    on_epoch = clock.task(f"seed {context.seed}: {method.name}")
    started = time.perf_counter()
    model, loss = method.build(context)
    fitted = fit(
        model,
        context.images,
        loss,
        context.settings.student_schedule,
        generator=context.generator("order"),
        score=lambda trained: _validation_score(context, trained),
        on_epoch=on_epoch,
        epoch_ended=getattr(model, "epoch_ended", None),
    )
    return _row(context, method.name, model, fitted, time.perf_counter() - started, gallery)


def _validation_score(context: Context, model: nn.Module) -> float:
    """The selection rule: worst-group accuracy on the validation pictures."""
    pictures = context.data.validation
    correct = in_batches(model, context.validation_images).argmax(1) == pictures.labels
    return group_accuracy(correct, pictures.groups, context.data.train.groups).worst_group


def _row(
    context: Context, name: str, model: nn.Module, fitted: Fitted, seconds: float, gallery: Gallery
) -> dict[str, Any]:
    """Measured on the test pictures; accuracies and energy in percent."""
    model = model.deployed() if isinstance(model, Learner) else model
    pictures, size = context.data.test, (context.settings.size, context.settings.size)
    feature = in_batches(model.forward_features, context.test_images)  # type: ignore[arg-type]
    with torch.no_grad():
        logits: Tensor = model.forward_head(feature)  # type: ignore[operator]
    maps = _maps(model, context.test_images, pictures.labels)
    energy = energy_in_box(maps, pictures.boxes, size)
    accuracy = group_accuracy(logits.argmax(1) == pictures.labels, pictures.groups, context.data.train.groups)
    gallery.add(name, maps, logits)
    return {
        "method": name,
        "seed": context.seed,
        "average_accuracy": accuracy.average,
        "worst_group_accuracy": accuracy.worst_group,
        "energy_in_box": 100 * float(energy.double().mean()),
        "seconds": round(seconds, 3),
        "parameters": count_parameters(model),
        "unbiased_accuracy": accuracy.unbiased,
        "adjusted_accuracy": accuracy.adjusted,
        "group_accuracies": {
            group: None if math.isnan(value) else value for group, value in zip(digits.GROUPS, accuracy.groups)
        },
        "maps_without_energy": int((maps.amax((1, 2)) <= 0).sum()),
        "validation_worst_group_accuracy": max(fitted.scores),
        "selected_epoch": fitted.epoch,
    }


def _maps(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Input × gradient at the last feature map: in closed form, but for logits that are adjusted for contexts."""
    guide = Guide(model)
    return torch.cat([guide.attribute(*part) for part in zip(images.split(500), labels.split(500))])
