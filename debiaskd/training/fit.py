"""Train one network of a recipe: from the network and its loss terms to weights in a stage's folder."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from debiaskd.attribution.attributor import Attributor
from debiaskd.models.depths import find
from debiaskd.models.modules import has_protocol
from debiaskd.recipe import Network, Recipe, RecipeError, Schedule, Teacher, to_dict
from debiaskd.terms import (
    ExplainOptions,
    ExplainTerm,
    GuideOptions,
    GuideTerm,
    Ranks,
    Setting,
    Term,
    TermOptions,
    make_explainer,
    make_guide,
)
from debiaskd.terms.own import build_term
from debiaskd.training.batches import Split, SplitLoader, open_split
from debiaskd.training.data_checks import check_data, expect_groups, hold_out
from debiaskd.training.dry_run import DryRun
from debiaskd.training.feature_extraction import FeatureExtractor
from debiaskd.training.learner import Learner
from debiaskd.training.loop import Plan, TrainingLoop
from debiaskd.training.networks import Networks
from debiaskd.training.run import ProgressCallback
from debiaskd.training.selection import CheckpointSelector, against_worst_group
from debiaskd.training.selection_rule import DESCRIPTIONS, rule_metrics, selection_rule
from debiaskd.training.split_parts import check_overlap
from debiaskd.training.teacher_outputs import TeacherOutputs
from debiaskd.training.validation import Evaluator, attribution_options
from debiaskd.utils import files

Made = TypeVar("Made", bound=Attributor)


class Trainer(Networks):
    """Train the networks of one recipe: its data, devices and seeds.

    Args:
        recipe: as checked.
        fabric: launched.
        progress: is told what is being done.

    Raises:
        RecipeError: the data does not have what the recipe asks for.
    """

    def __init__(self, recipe: Recipe, fabric: Any, progress: ProgressCallback) -> None:
        self.fabric, self.ranks = fabric, Ranks()
        train = open_split(recipe.data, "train", training=True)
        #: Training images that nothing trains on, for the student's refit.
        self.heldout: Split | None = None
        if recipe.refit is not None and recipe.refit.method != "evals":
            self.heldout, train = hold_out(recipe, train, recipe.refit.share)
        self.validation = open_split(recipe.data, "validation")
        expect_groups(recipe, train, self.validation)
        check_overlap(recipe, warn=self.ranks.rank == 0)
        check_data(recipe, train, self.validation)
        #: How the student's epoch is selected.
        self.rule = selection_rule(recipe, self.validation, guided=recipe.terms.guide is not None)
        rule_metrics(self.rule, self.validation)
        super().__init__(recipe, train, progress)

    def dry_run(
        self,
        model: nn.Module,
        terms: dict[str, TermOptions],
        schedule: Schedule,
        *,
        teacher: TeacherOutputs | None = None,
        network: Network | None = None,
        schedule_key: str = "schedule",
        run: bool = True,
    ) -> None:
        """Raises RecipeError if a network cannot be trained so; `model` is of no use afterwards.

        Args:
            model, terms, schedule, teacher, network: as for `fit`.
            schedule_key: the schedule's section in the recipe.
            run: one training step, too, of a pass's images.
        """
        network = network or self.recipe.student
        learner, share = self._learner(model, terms, teacher, None, network), self._share(schedule, schedule_key)
        if not run:
            return
        loader = self.loader(self.train, network, training=True, batch=share, teacher_outputs=teacher, alone=True)
        key = "teacher" if isinstance(network, Teacher) else "student"
        several = self.recipe.compute.sync_batchnorm and self.ranks.world_size > 1
        dry_run = DryRun(
            self.fabric,
            loader,
            network.name,
            key,
            schedule_key,
            schedule,
            several=several,
            own_terms=tuple(self.recipe.terms.own),
        )
        dry_run.run(learner)

    def _share(self, schedule: Schedule, key: str = "schedule") -> int:
        """Images per process and forward pass."""
        share = schedule.batch // schedule.accumulate // self.ranks.world_size
        if share * schedule.accumulate * self.ranks.world_size != schedule.batch:
            passes = f" × {schedule.accumulate} passes" if schedule.accumulate > 1 else ""
            processes = f"{self.ranks.world_size} processes{passes}"
            raise RecipeError(f"{key}.batch: {schedule.batch} is no multiple of {processes}")
        if self.recipe.data.mixing is not None and share < 2:
            found = f"{key}.batch={schedule.batch} in {self.ranks.world_size} processes has {share}"
            raise RecipeError(f"{self.recipe.data.mixing}: mixes images of a process's pass, which needs two; {found}")
        return share

    def fit(
        self,
        name: str,
        folder: Path,
        fingerprint: str,
        model: nn.Module,
        terms: dict[str, TermOptions],
        schedule: Schedule,
        *,
        teacher: TeacherOutputs | None = None,
        weight: Tensor | None = None,
        rule: str | None = None,
        sampling: Tensor | None = None,
        network: Network | None = None,
        validation: Split | None = None,
        training: Split | None = None,
    ) -> dict[str, Any]:
        recipe, network = self.recipe, network or self.recipe.student
        learner = self._learner(model, terms, teacher, weight, network)
        if recipe.compute.compile:
            model.compile()
        share = self._share(schedule)
        images = training or self.train
        if len(images) < schedule.batch:
            raise RecipeError(f"{name}: {schedule.batch} images a step, and it is trained on {len(images)}")
        loader = self.loader(images, network, training=True, batch=share, sampling=sampling, teacher_outputs=teacher)
        validated = self.loader(validation or self.validation, network, training=False, batch=share)
        rule = rule or selection_rule(recipe, self.validation, guided="guide" in terms)
        names = rule_metrics(rule, self.validation)
        maps = recipe.selection.attributions
        if maps is None:
            maps = "guide" in terms or bool({"epg", "iou"} & set(names))
        guide = attribution_options(recipe, name)
        evaluation = Evaluator(validated, self.train.groups, guide, maps=maps, autocast=self.fabric.autocast)
        selector = CheckpointSelector(folder, rule, names, self.about(name, network))
        plan = Plan(
            folder=folder,
            identity=fingerprint,
            learner=learner,
            loader=loader,
            schedule=schedule,
            compute=recipe.compute,
            seed=zlib.crc32(f"{recipe.seed}/{name}/steps".encode()),
            validate=evaluation,
            selector=selector,
            every=recipe.selection.every,
            views=None if teacher is None else teacher.views,
            config=to_dict(recipe),
        )
        loop = TrainingLoop(plan, self.fabric, lambda done, news: self._progress(name, done, news))
        loop.run()
        return self._finish(folder, selector, loop, rule, names)

    def _progress(self, stage: str, done: float, news: str) -> None:
        self.progress(stage, done, news)
        for line in self.contracts.new_messages():
            self.progress(stage, done, line)

    def _finish(
        self, folder: Path, selector: CheckpointSelector, training: TrainingLoop, rule: str, names: tuple[str, ...]
    ) -> dict[str, Any]:
        assert selector.best is not None
        if self.fabric.is_global_zero:
            best = selector.path(selector.best)
            files.write(folder / "model.safetensors", lambda path: copyfile(best, path))
            if selector.front is not None:
                selector.front.plot(folder / "pareto.png")
            training.checkpoints.clear()
        self.fabric.barrier()
        return {
            "epoch": selector.best,
            "epochs": training.plan.schedule.epochs,
            "selection": DESCRIPTIONS[rule].format(", ".join(names)),
            "rule": rule,
            "front": selector.selected,
            **against_worst_group(selector, rule),
            **_stopped(training, rule, names),
            "training_groups": self._group_counts(),
            "figures": {n: v if v == v else None for n, v in selector.figures[str(selector.best)].items()},  # no NaN
        }

    def _group_counts(self) -> dict[str, int] | None:
        """Training images of each group, for the adjusted accuracy of data that has no training split."""
        groups, names = self.train.groups, self.train.whole.groups
        return None if groups is None else dict(zip(names, groups.bincount(minlength=len(names)).tolist()))

    def _learner(
        self,
        model: nn.Module,
        terms: dict[str, TermOptions],
        teacher: TeacherOutputs | None,
        weight: Tensor | None,
        network: Network,
    ) -> Learner:
        kinds = {name: self.recipe.terms.kind(name) for name in terms}
        wanted = {
            need.partition(".")[2] for kind in kinds.values() for need in kind.needs if need.startswith("student.")
        }
        at = self.feature_layers(model, network, wanted) if wanted else None
        split = self.train
        setting = Setting(
            num_classes=split.num_classes,
            multi_label=split.whole.multi_label,
            num_groups=len(split.whole.groups),
            student_width=0 if at is None else at.pooled_width,
            teacher_width=None if teacher is None else teacher.width,
        )
        if "backdoor" in terms and not has_protocol(model):
            raise RecipeError("terms.backdoor: needs a student with timm's forward_features, or a transplanted one")
        made: dict[str, Term] = {}
        guide = explainer = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{self.recipe.seed}/terms".encode()))
            for name, options in terms.items():
                if isinstance(options, GuideOptions):
                    guide = self._attributor(name, partial(make_guide, options), model, network)
                    made[name] = GuideTerm(options, guide)
                elif isinstance(options, ExplainOptions):
                    explainer = self._attributor(name, partial(make_explainer, options), model, network)
                    made[name] = ExplainTerm(options, explainer)
                else:
                    made[name] = build_term(kinds[name], options, setting)
        unregistered: dict[str, Any] = {"teacher": teacher, "guide": guide, "explainer": explainer, "weight": weight}
        return Learner(FeatureExtractor(model, at, wanted), made, **unregistered)

    def _attributor(self, name: str, make: Callable[[nn.Module], Made], model: nn.Module, network: Network) -> Made:
        try:
            attributor = make(model)
            find(model, attributor.layer, self.example(network))
        except (ValueError, TypeError) as error:
            raise RecipeError(f"terms.{name}: {error}") from None
        return attributor

    def loader(
        self,
        split: Split,
        network: Network,
        *,
        training: bool,
        batch: int,
        sampling: Tensor | None = None,
        teacher_outputs: TeacherOutputs | None = None,
        alone: bool = False,
    ) -> SplitLoader:
        """Batches of a split as a network reads them, with the teacher's input where the teacher runs on them, too."""
        ranks = Ranks()
        if alone:  # every process reads all of it
            ranks.rank, ranks.world_size = 0, 1
        return SplitLoader(
            split,
            self.recipe.data,
            training=training,
            batch=batch,
            ranks=ranks,
            device=self.fabric.device,
            seed=self.recipe.seed,
            workers=self.recipe.compute.workers,
            contract=self.contract(network),
            teacher=None if teacher_outputs is None else self.contracts.teacher,
            with_teacher_input=teacher_outputs is not None and teacher_outputs.views is None,
            sampling=sampling,
        )


def _stopped(training: TrainingLoop, rule: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Why a training ended before its last epoch: {"stopped": facts}; empty where it did not."""
    schedule, done = training.plan.schedule, training.step // training.steps
    if done >= schedule.epochs:
        return {}
    compared = "Pareto front over " + ", ".join(names) if rule == "pareto" else names[0]
    why = f"no improvement of {compared} on validation in {training.waited} epochs"
    return {"stopped": {"epochs": done, "patience": schedule.patience, "why": why}}
