"""One training of a recipe: from a network and its terms to weights in a stage's folder."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.attribution.guide import Guide
from debiaskd.bias import found_names
from debiaskd.models.depths import check_layer, find
from debiaskd.models.input import InputContract
from debiaskd.models.modules import has_protocol
from debiaskd.models.registry import build, load_weights, prepare, pretrained_classes
from debiaskd.recipe import Network, Recipe, RecipeError, Schedule, Teacher
from debiaskd.terms import GuideOptions, GuideTerm, Ranks, Setting, Term, TermOptions, make_guide
from debiaskd.terms.own import build_term
from debiaskd.training.batches import Split, SplitLoader, open_split
from debiaskd.training.dry_run import DryRun
from debiaskd.training.feature_extraction import FeatureExtractor, FeatureLayers, find_feature_layers
from debiaskd.training.head_weights import from_file
from debiaskd.training.input_contracts import InputContracts
from debiaskd.training.learner import Learner
from debiaskd.training.loop import Plan, TrainingLoop
from debiaskd.training.rebuild import starting_network
from debiaskd.training.run import ProgressCallback
from debiaskd.training.selection import RULES, CheckpointSelector, against_worst_group
from debiaskd.training.split_parts import check_overlap, divided
from debiaskd.training.teacher_outputs import TeacherOutputs
from debiaskd.training.validation import Evaluator, attribution_options, available_metrics, has_boxes
from debiaskd.utils import files

SELECTION = {
    "worst_group": "worst-group accuracy on validation, whose groups are known; the later of equals",
    "worst_environment": "worst-environment accuracy on validation, whose groups were found, not known; the later of "
    "equals",
    "accuracy": "average accuracy on validation; the later of equals",
    "f1": "F1 on validation; the later of equals",
    "pareto": "Pareto front over {} on validation, in bins of 0.005; the highest sum in front",
    "last": "the last epoch",
}


class Trainer:
    """What the trainings of one recipe share: pictures, devices, seeds.

    Args:
        recipe: as checked.
        fabric: launched.
        say: is told what is being done.

    Raises:
        RecipeError: the data does not have what the recipe asks for.
    """

    def __init__(self, recipe: Recipe, fabric: Any, progress: ProgressCallback) -> None:
        self.recipe, self.fabric, self.progress = recipe, fabric, progress
        self.reported: set[tuple[str, str]] = set()
        self.ranks = Ranks()
        self.train = open_split(recipe.data, "train", training=True)
        #: Training images that nothing trains on, for the student's refit.
        self.heldout: Split | None = None
        if recipe.refit is not None and recipe.refit.method != "evals":
            self._hold_out(recipe.refit.share)
        self.validation = open_split(recipe.data, "validation")
        self._expect_groups()
        check_overlap(recipe, warn=self.ranks.rank == 0)
        self._check_data()
        #: By which the student's epoch is selected.
        self.rule = self._rule(guided=recipe.terms.guide is not None)
        self._names(self.rule)
        self.contracts = InputContracts(recipe, self.train.whole.size)
        networks = {"student": recipe.student, "teacher": recipe.teacher}
        self.starting_networks = {
            name: None if network is None else starting_network(name, network, recipe)
            for name, network in networks.items()
        }

    def _hold_out(self, share: float) -> None:
        """Keep a share of each class's training images from every training of the recipe."""
        if self.train.whole.multi_label:
            raise RecipeError("refit: needs one class an image, here it may be several")
        held, rest = divided(self.train.target, share, torch.Generator().manual_seed(self.recipe.data.seed))
        if not len(rest):
            raise RecipeError(f"refit.holdout: {share} of {len(self.train)} training images leaves none to train on")
        self.heldout, self.train = self.train.part(held), self.train.part(rest)

    def _expect_groups(self) -> None:
        """Tell the splits which groups the recipe's discovery is going to find."""
        options = self.recipe.discovery
        if options is None:
            return
        if self.train.whole.multi_label:
            raise RecipeError("discovery: needs one class an image, here it may be several")
        names = found_names(self.train.whole.classes, options.clusters)
        for split in (self.train, self.validation):
            split.expect(names, as_groups=self.recipe.data.groups == "found")

    def _check_data(self) -> None:
        recipe, split = self.recipe, self.train
        if split.whole.multi_label:
            for name in ("kd", "relation", "backdoor"):  # kd softens a softmax
                if getattr(recipe.terms, name) is not None:
                    raise RecipeError(f"terms.{name}: needs one class a picture, here it may be several")
            if recipe.weights is not None and recipe.weights.method == "errors":
                raise RecipeError("weights.method: errors needs one class a picture, here it may be several")
            if recipe.teacher is not None and recipe.teacher.method == "jtt":
                raise RecipeError("teacher.method: jtt needs one class a picture, here it may be several")
            if recipe.terms.supervised is not None and recipe.terms.supervised.label_smoothing:
                raise RecipeError("terms.supervised.label_smoothing: needs one class a picture, here there may be more")
        grouped = recipe.weights is not None and recipe.weights.method == "groups"
        if recipe.teacher is not None and recipe.teacher.method in ("balanced", "group_dro", "dfr"):
            grouped = True
        grouped = grouped or (recipe.teacher is not None and recipe.teacher.probe == "groups")
        if split.groups is None and grouped:
            hint = "those of your own pictures come from bias.csv (`debiaskd prepare folder`)"
            raise RecipeError(f"data.path: groups are asked for, and the prepared data has none; {hint}")
        for name, term in recipe.terms.own.items():
            if "groups" in term.needs and split.groups is None:
                raise RecipeError(f"terms.{name}: needs groups, and the prepared data has none")
            if "boxes" in term.needs and not len(split.boxes.coords):
                raise RecipeError(f"terms.{name}: needs boxes, and the training pictures have none")
        if recipe.terms.guide is not None and not len(split.boxes.coords):
            raise RecipeError("terms.guide: the training pictures have no boxes")
        if recipe.selection.attributions and not has_boxes(self.validation):
            raise RecipeError("selection.attributions: the validation pictures have no boxes to compare them with")
        for name, schedule in recipe.schedules().items():
            if schedule.batch > len(split):
                found = f"{schedule.batch} pictures a step, and the training split has {len(split)}"
                raise RecipeError(f"{name}.batch: {found}")

    def contract(self, network: Network) -> InputContract:
        """What one of the recipe's networks reads."""
        return self.contracts.of(network)

    def network(self, options: Network, purpose: str) -> nn.Module:
        """With initial weights of the recipe's seed and this purpose alone, or with those it begins from."""
        base = self.starting_networks.get(role(options))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{self.recipe.seed}/{purpose}".encode()))
            if base is not None and options.weights is not None:
                model, taken = base.begin(options.weights, self.contract(options), self.train.num_classes)
                self._report(purpose, options.weights, taken)
                return model
            model = build(
                options.name,
                self.train.num_classes,
                pretrained=options.pretrained,
                size=self.contract(options).size,
                options=options.options,
            )
        as_it_is = isinstance(options, Teacher) and options.method == "checkpoint"
        if as_it_is and options.pretrained and not options.made_head:
            self._check_last_layer(options, model)
        if options.layer is not None:
            try:
                check_layer(model, options.layer)
            except (ValueError, TypeError) as error:
                key = "teacher" if isinstance(options, Teacher) else options.name
                raise RecipeError(f"{key}: {error}") from None
        model = prepare(model, self.contract(options), x_dnn=options.bias_free, classes=self.train.num_classes)
        if options.weights is not None:
            to_train = not as_it_is or options.made_head is not None
            self._report(purpose, options.weights, load_weights(model, options.weights, to_train=to_train))
        if options.made_head not in (None, "probe"):
            from_file(model, self.example(options), str(options.head))
        return model

    def _check_last_layer(self, options: Network, model: nn.Module) -> None:
        there, here = pretrained_classes(options.name, model), self.train.num_classes
        if there != here:
            raise RecipeError(
                f"teacher.pretrained: the pretrained weights of {options.name} have a last layer of {there} classes, "
                f"the data has {here}: it would be random. Fit one "
                "(teacher.head: probe), name a file of one, or train the teacher (teacher.method)"
            )

    def _report(self, purpose: str, path: str, taken: str) -> None:
        """What was taken from a file of weights, once, although a network may be made several times."""
        if taken and (purpose, path) not in self.reported:
            self.reported.add((purpose, path))
            self.progress(purpose, 0.0, f"weights {path}: {taken}")

    def about(self, stage: str, network: Network) -> dict[str, Any]:
        """What a file of weights says of itself."""
        found = {"stage": stage, "classes": list(self.train.whole.classes), **self.contracts.about(stage, network)}
        starting_networks = {name: base.kept() for name, base in self.starting_networks.items() if base is not None}
        if any(starting_networks.values()):
            found["bases"] = {name: base for name, base in starting_networks.items() if base is not None}
        return found

    def load_projector(self, model: nn.Module) -> None:
        """Weights of the run that the student began from, for a projector that fits them."""
        base, path = self.starting_networks.get("student"), self.recipe.student.weights
        if base is not None and path is not None and base.new_head:
            base.load_projector(model, path)

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
            run: one training step, too, of a pass's pictures.
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
        """Pictures of each process in a pass."""
        share = schedule.batch // schedule.accumulate // self.ranks.world_size
        if share * schedule.accumulate * self.ranks.world_size != schedule.batch:
            passes = f" × {schedule.accumulate} passes" if schedule.accumulate > 1 else ""
            processes = f"{self.ranks.world_size} processes{passes}"
            raise RecipeError(f"{key}.batch: {schedule.batch} is no multiple of {processes}")
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
        rule = rule or self._rule(guided="guide" in terms)
        names = self._names(rule)
        maps = recipe.selection.attributions
        if maps is None:
            maps = "guide" in terms or bool({"epg", "iou"} & set(names))
        looked = attribution_options(recipe, name)
        evaluation = Evaluator(validated, self.train.groups, looked, maps=maps, autocast=self.fabric.autocast)
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
            content = selector.path(selector.best).read_bytes()
            files.write(folder / "model.safetensors", lambda path: void(path.write_bytes(content)))
            if selector.front is not None:
                selector.front.plot(folder / "pareto.png")
            training.checkpoints.clear()
        self.fabric.barrier()
        return {
            "epoch": selector.best,
            "epochs": training.plan.schedule.epochs,
            "selection": SELECTION[rule].format(", ".join(names)),
            "rule": rule,
            "front": selector.selected,
            **against_worst_group(selector, rule),
            "training_groups": self._group_counts(),
            "figures": {name: none_for_nan(value) for name, value in selector.figures[str(selector.best)].items()},
        }

    def _group_counts(self) -> dict[str, int] | None:
        """Training pictures of each group, for the adjusted accuracy of data that has no training split."""
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
        guide = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{self.recipe.seed}/terms".encode()))
            for name, options in terms.items():
                if isinstance(options, GuideOptions):
                    guide = self._guide(options, model, network)
                    made[name] = GuideTerm(options, guide)
                else:
                    made[name] = build_term(kinds[name], options, setting)
        return Learner(FeatureExtractor(model, at, wanted), made, teacher=teacher, guide=guide, weight=weight)

    def _guide(self, options: GuideOptions, model: nn.Module, network: Network) -> Guide:
        try:
            find(model, options.layer, self.example(network))
            return make_guide(options, model)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"terms.guide: {error}") from None

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
        """Of a split, as a network reads them, with a teacher's input where it looks at them beside it."""
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

    def _rule(self, *, guided: bool) -> str:
        rule, names = self.recipe.selection.rule, available_metrics(self.validation)
        if rule is None:
            if "worst_group_accuracy" in names:
                return "worst_group"
            if "worst_environment_accuracy" in names:
                return "worst_environment"
            guided = guided and self.recipe.selection.attributions is not False
            return "pareto" if guided and "epg" in names else "accuracy" if "accuracy" in names else "f1"
        return rule

    def _names(self, rule: str) -> tuple[str, ...]:
        found = available_metrics(self.validation)
        wanted = tuple("accuracy" if n == "f1" and rule == "pareto" and n not in found else n for n in RULES[rule])
        missing = [name for name in wanted if name not in found]
        if missing:
            there = ", ".join(found) or "none"
            hint = "; `discovery: {}` finds environments" if rule == "worst_environment" else ""
            raise RecipeError(
                f"selection.rule: {rule} needs {missing[0]}, and the validation pictures give {there}{hint}"
            )
        return wanted

    def example(self, options: Network) -> Tensor:
        return self.contract(options).example()

    def feature_layers(self, model: nn.Module, options: Network, wanted: Iterable[str]) -> FeatureLayers:
        try:
            return find_feature_layers(model, self.example(options), options.layer, options.named_head, wanted)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{options.name}: {error}") from None


def role(network: Network) -> str:
    return "teacher" if isinstance(network, Teacher) else "student"


def none_for_nan(value: float) -> float | None:
    return value if value == value else None


def void(value: object) -> None:
    """For functions that are called for what they do."""
