"""Run the stages of a recipe in order: teacher, weights, pretraining, student."""

from __future__ import annotations

import copy
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from debiaskd.models.frozen_teacher import FrozenTeacher
from debiaskd.models.hugging_face import folder_hash
from debiaskd.models.registry import load_weights, weights_hash
from debiaskd.models.transplant import Transplanted
from debiaskd.pipeline.context import StageContext
from debiaskd.pipeline.discovery import discovered
from debiaskd.pipeline.head_probe import probed
from debiaskd.pipeline.last_layer import last_layer
from debiaskd.pipeline.projector import fitted_projector
from debiaskd.pipeline.refits import check_refit, refitted
from debiaskd.pipeline.teacher_outputs import live_teacher, teacher_outputs
from debiaskd.pipeline.teachers import check_dfr, student_selection, teacher_terms, trained_options, trained_teacher
from debiaskd.pipeline.weights import read_weights, sample_weights
from debiaskd.recipe import REFITS, Recipe, RefitOptions, Teacher
from debiaskd.terms import SupervisedOptions, TermOptions
from debiaskd.training.fit import Trainer
from debiaskd.training.head_weights import check as check_probe
from debiaskd.training.loggers import wanted
from debiaskd.training.rebuild import BEFORE_REFIT, frozen, observed, transplanted
from debiaskd.training.run import STAGE, ProgressCallback, Run, Stage, data_fingerprint, decisive
from debiaskd.training.schedule import brief_schedule
from debiaskd.training.shared_stages import SharedStages
from debiaskd.training.teacher_cache import PARTS
from debiaskd.training.teacher_outputs import FrozenExtractor, TeacherOutputs
from debiaskd.utils import files


class Pipeline(StageContext):
    """The stages of one recipe, on a Fabric that has been launched.

    Args:
        recipe: as checked.
        folder: of the run.
        fabric: see `debiaskd.training.fabric`.
        progress: is called with what is being done.

    Raises:
        RecipeError, RunError, DataError, NetworkError: before anything is trained.
    """

    def __init__(self, recipe: Recipe, folder: Path, fabric: Any, progress: ProgressCallback) -> None:
        self.recipe, self.fabric = recipe, fabric
        wanted(recipe.compute)
        news: list[tuple[str, float, str]] = []
        self.trainer = Trainer(recipe, fabric, lambda *one: news.append(one))
        self.student_network = self.trainer.network(recipe.student, "student")
        finished = (folder / "student" / STAGE).exists()  # so all of it has been trained
        self._dry_run(begun=(folder / "recipe.yaml").exists(), run=not finished)
        self.base = {"data": data_fingerprint(recipe.data.path)}
        if recipe.data.groups not in (None, "none", "found"):
            self.base["groups"] = files.sha256(Path(recipe.data.groups))
        begun = {"student": recipe.student, "teacher": recipe.teacher}
        for name, network in begun.items():
            if network is not None and network.weights is not None:
                self.base[f"{name}.weights"] = weights_hash(network.weights)
            folder_of_name = None if network is None else folder_hash(network.name, weights=network.pretrained)
            if folder_of_name is not None:
                self.base[f"{name}.folder"] = folder_of_name
            if network is not None and network.made_head not in (None, "probe"):
                self.base[f"{name}.head"] = files.sha256(Path(str(network.head)))
        self.run = Run(folder, recipe, write=fabric.is_global_zero, shared=self._shared())
        self.trainer.progress = _later(news, progress)

    def _shared(self) -> SharedStages | None:
        folder, fabric = self.recipe.compute.stages, self.fabric
        if folder is None:
            return None
        return SharedStages(
            Path(folder),
            write=fabric.is_global_zero,
            broadcast=fabric.broadcast,
            news=lambda text: self.trainer.progress("stages", 0.0, text),
        )

    def _dry_run(self, *, begun: bool, run: bool) -> None:
        """Networks and terms are put together once, and with `run` each network runs a training step, so that what does
        not fit is said before hours of training."""
        recipe, model, teacher = self.recipe, copy.deepcopy(self.student_network), None
        labels: dict[str, TermOptions] = {"supervised": SupervisedOptions()}
        if recipe.teacher is not None:
            source = self.trainer.network(recipe.teacher, "teacher")
            if recipe.teacher.method == "dfr":
                check_dfr(self.trainer, recipe.teacher, begun=begun)
                last_layer(self.trainer, recipe.teacher, source, "teacher.method: dfr")
            if recipe.teacher.method in REFITS:
                refit = recipe.teacher.refit or RefitOptions()
                check_refit(self, recipe.teacher, source, refit, recipe.teacher.method, "teacher.method")
            if recipe.teacher.schedule is not None:
                self.trainer.dry_run(
                    copy.deepcopy(source),
                    teacher_terms(recipe.teacher),
                    recipe.teacher.schedule,
                    network=recipe.teacher,
                    schedule_key="teacher.schedule",
                    run=run,
                )
            if recipe.teacher.head == "probe":
                check_probe(source, self.trainer.example(recipe.teacher))
            teacher = self._freeze_teacher(source, recipe.teacher)
            if isinstance(teacher, FrozenTeacher):
                model = self._transplanted(teacher, model)
        if recipe.pretraining is not None:
            plain = copy.deepcopy(self.student_network)
            self.trainer.dry_run(plain, labels, recipe.pretraining, schedule_key="pretraining", run=run)
        if recipe.weights is not None and recipe.weights.method == "errors" and recipe.transplant is not None:
            plain = copy.deepcopy(self.student_network)
            self.trainer.dry_run(plain, labels, brief_schedule(recipe.schedule, recipe.weights.epochs), run=run)
        if recipe.refit is not None:
            check_refit(self, recipe.student, model, recipe.refit, recipe.refit.method, "refit")
        taught = None if teacher is None or recipe.teacher is None else live_teacher(self, teacher, recipe.teacher)
        self.trainer.dry_run(model, self._terms(), recipe.schedule, teacher=taught, run=run)

    def _terms(self) -> dict[str, TermOptions]:
        return self.recipe.terms.given()

    def _required_outputs(self) -> set[str]:
        """The teacher outputs that the terms need."""
        return {need.partition(".")[2] for need in self.recipe.terms.needs() if need.startswith("teacher.")}

    def _freeze_teacher(self, source: nn.Module, options: Teacher) -> FrozenTeacher | FrozenExtractor:
        """The frozen teacher; cut into body and head only where its head is transplanted."""
        example = self.trainer.example(options)
        if self.recipe.transplant is not None:
            return frozen(source, options, example)
        return observed(source, options, example, sorted(self._required_outputs() & {"feature", "pooled"}))

    # -- stages -------------------------------------------------------------------------------------------------------

    def student(self) -> Stage:
        """The last stage, after all those that it needs. The folder is free for others afterwards.

        Raises:
            DivergedError, CheckpointError, OSError: see `TrainingLoop.run`.
        """
        try:
            return self._student()
        finally:
            self.run.release()

    def teacher_alone(self) -> Stage:
        """The teacher's stage, after those that it needs, and nothing after it. `student` continues from there.

        Raises:
            RecipeError: the recipe trains no teacher.
            DivergedError, CheckpointError, OSError: see `TrainingLoop.run`.
        """
        try:
            options = trained_options(self.recipe)
            discovered(self)
            return self._teacher_stage(options)
        finally:
            self.run.release()

    def _student(self) -> Stage:
        discovered(self)
        recipe, model, before = self.recipe, self.student_network, dict(self.base)
        found = weight = sampling = None
        if recipe.weights is not None:
            stage = sample_weights(self)
            before["weights"] = stage.fingerprint
            found = read_weights(stage)
            if recipe.weights.draw:
                sampling = found
            else:
                weight = self.scatter_weights(found)
        if recipe.pretraining is not None:
            stage = self._pretraining()
            before["pretraining"] = stage.fingerprint
            load_weights(model, stage.model)
        teacher: TeacherOutputs | None = None
        terms = self._terms()
        if recipe.teacher is not None:
            source, fingerprint = self.teacher(recipe.teacher)
            before["teacher"] = fingerprint
            frozen_teacher = self._freeze_teacher(source, recipe.teacher)
            if isinstance(frozen_teacher, FrozenTeacher):
                model = self._transplanted(frozen_teacher, model)
            needs = self._required_outputs()
            if needs:
                parts = tuple(p for p in PARTS if p in needs or p == "logits")  # those are small, and always there
                teacher = teacher_outputs(self, frozen_teacher, recipe.teacher, fingerprint, parts)
        if recipe.transplant is not None and recipe.transplant.init == "least_squares":
            assert isinstance(model, Transplanted) and teacher is not None
            whole = None if found is None else self.scatter_weights(found)
            before["projector"] = fitted_projector(self, model, teacher, before, whole).fingerprint
        networks = [recipe.student] if recipe.teacher is None else [recipe.student, recipe.teacher]
        inputs = {**before, **self.trainer.contracts.decisive(*networks), "recipe": decisive(self.run.document)}
        chosen = student_selection(self.trainer)

        def make(folder: Path, fingerprint: str) -> dict[str, Any]:
            facts = self.trainer.fit(
                "student",
                folder,
                fingerprint,
                model,
                terms,
                recipe.schedule,
                teacher=teacher,
                weight=weight,
                sampling=sampling,
                **chosen,
            )
            if "rule" in chosen:
                facts["selection"] += ": the validation images fitted the teacher's last layer"
            return facts

        if recipe.refit is None:
            return self.run.stage("student", inputs, make)
        stage, refit = self.run.stage(BEFORE_REFIT, inputs, make), recipe.refit
        return refitted(self, "student", recipe.student, refit.method, refit, stage, lambda: model, recipe.schedule)

    def _pretraining(self) -> Stage:
        recipe = self.recipe
        assert recipe.pretraining is not None
        schedule = recipe.pretraining
        inputs = {**self.base, **self.common(), **self.trainer.contracts.decisive(recipe.student)}
        inputs |= {"student": self.run.document["student"], "schedule": self.run.document["pretraining"]}
        older = dict(inputs)
        if recipe.terms.guide is not None:  # its layer and attribution are those of the metrics on validation
            guide = self.run.document["terms"]["guide"]
            inputs["looked_at"] = [guide.get(key) for key in ("layer", "attribution", "steps")]

        def make(folder: Path, fingerprint: str) -> dict[str, Any]:
            model = self.trainer.network(recipe.student, "student")
            return self.trainer.fit(
                "pretraining", folder, fingerprint, model, {"supervised": SupervisedOptions()}, schedule
            )

        return self.run.stage("pretraining", inputs, make, older=older)

    def teacher(self, options: Teacher) -> tuple[nn.Module, str]:
        """The teacher, trained here if need be, and a fingerprint of its weights."""
        model = self.trainer.network(options, "teacher")
        if not options.is_trained:
            published = folder_hash(options.name, weights=True) if options.pretrained else None
            what = published or "pretrained" if options.weights is None else weights_hash(options.weights)
            head = f" {files.sha256(Path(options.made_head))}" if options.made_head else ""
            return model, f"{options.name} {what}{head}"
        stage = self._teacher_stage(options)
        load_weights(model, stage.model)
        return model, stage.fingerprint

    def _teacher_stage(self, options: Teacher) -> Stage:
        return probed(self, options) if options.head == "probe" else trained_teacher(self, options)

    def _transplanted(self, teacher: FrozenTeacher, student: nn.Module) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{self.recipe.seed}/projector".encode()))
            model = transplanted(self.recipe, teacher, student, self.trainer.example(self.recipe.student))
        self.trainer.load_projector(model)
        return model


def _later(news: list[tuple[str, float, str]], progress: ProgressCallback) -> ProgressCallback:
    """Delay messages from building the networks until training starts, so that an error is the only output."""

    def said(task: str, done: float, text: str) -> None:
        while news:
            progress(*news.pop(0))
        progress(task, done, text)

    return said
