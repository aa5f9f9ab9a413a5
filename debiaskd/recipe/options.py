"""The keys of a recipe, as dataclasses whose docstrings are the command's help. None as a default means that the option
only applies where something else asks for it, and is refused elsewhere (`checking`)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from debiaskd.recipe.bias_options import Discovery, Refit, RefitOptions
from debiaskd.recipe.compute_options import Compute
from debiaskd.recipe.data_options import Data as Data
from debiaskd.recipe.schedule_options import Schedule
from debiaskd.terms import (
    TERMS,
    BackdoorOptions,
    ExplainOptions,
    GuideOptions,
    KdOptions,
    MatchOptions,
    RelationOptions,
    SampleOptions,
    SupervisedOptions,
    Term,
    TermOptions,
)
from debiaskd.terms.own import OwnTerm


@dataclass
class Input:
    """What a network reads. What is left out comes from its weights: from the run that trained them, from timm's
    `pretrained_cfg`, torchvision's `transforms()` or transformers' preprocessor_config.json; else mean and std are
    ImageNet's.

    Args:
        size: side in pixels; if it is left out, `data.size`, or the size of a network that reads one size only.
        mean, std: of red, green and blue pixels in 0..1, three numbers each.
        interpolation: how images of another size are resized to it.
    """

    size: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None


@dataclass
class Network:
    """A network.

    Args:
        name: of timm, "resnet18"; or "torchvision/resnet18", "bcos/resnet18", "small/8,16,32" (convolutions of these
            widths, each halving the map; "8/1" keeps its size), "cifar/resnet20"; "hf/resnet", a model type of Hugging
            Face transformers, or "hf/FOLDER" of its save_pretrained; a network of your own, "package.module:callable",
            or a name that `debiaskd.register_model` knows.
        pretrained: begin from the weights that timm or torchvision know for the name, which they download, or from
            those in the folder of "hf/FOLDER".
        weights: begin from these: a file of safetensors, the index of its shards, a state dict or a checkpoint that has
            one, or the folder of a run. A last layer of other classes is re-initialised, unless the network is used as
            it is.
        bias_free: make it an X-DNN.
        layer, head: names of its last feature map's module and of its last linear layer, where they are not found.
        input: what it reads, where that is not what its weights were trained with.
        options: keyword arguments of timm's `create_model`, of torchvision's builder, of transformers' configuration or
            of your own callable, such as {img_size: 96, drop_path_rate: 0.1}.
    """

    name: str
    pretrained: bool = False
    weights: str | None = None
    bias_free: bool = False
    layer: str | None = None
    head: str | None = None
    input: Input | None = None
    options: dict[str, Any] | None = None

    @property
    def made_head(self) -> str | None:
        """How its last layer is made, where `head` says that and not what it is called: "probe", or a file."""
        made = self.head is not None and (self.head == "probe" or self.head.endswith(".safetensors"))
        return self.head if made else None

    @property
    def named_head(self) -> str | None:
        return None if self.made_head else self.head


@dataclass
class Teacher(Network):
    """A teacher, and how it comes to be debiased.

    Args:
        method: "checkpoint": it is given by `weights` or `pretrained`. Trained here on the labels: "erm" plainly;
            "balanced" with its groups drawn alike; "group_dro", which draws them alike, too; "jtt",
            which needs `up`; "dfr", erm with its last layer refitted on validation images, groups alike. Without
            annotation of the bias, erm on a part of the training images with its last layer refitted: "afr" on the
            others, weighted by how unsure it is of them; "self" on those of the others that it and a briefly trained
            network differ on most; "class_balanced" on the others, classes alike; "evals", trained on all, on the
            validation images of the highest and lowest losses.
        schedule: of its training.
        up: weight of a briefly trained model's mistakes, for jtt.
        identification_epochs: of that model, for jtt.
        head: also "probe": its last layer is fitted to the training images, all else stays as it is; or a file of
            safetensors that holds it, `weight` [K,D] and perhaps `bias` [K].
        probe: "plain": every training image counts alike; "groups": every group; "weights": by the recipe's weights.
            For head probe; plain if it is left out.
        step_size: for group_dro; 0.01 if it is left out.
        validation_share: for dfr: the share of each group's validation images that the last layer is fitted on; the
            others select the student's epoch. Left out, all of them fit it, and the student's last epoch is kept,
            unless `selection.reuse`.
        refit: for afr, self, class_balanced and evals.
        cache: what it says of the training images is computed once and kept on disk, as "fp32" or "bf16"; computed
            in every step if it is left out.
        views: with a cache, the fixed augmentations of each image, taken in turns; 1 if it is left out.
    """

    method: Literal[
        "checkpoint", "erm", "balanced", "group_dro", "jtt", "dfr", "afr", "self", "class_balanced", "evals"
    ] = "checkpoint"
    schedule: Schedule | None = None
    up: float | None = None
    identification_epochs: int | None = None
    step_size: float | None = None
    probe: Literal["plain", "groups", "weights"] | None = None
    validation_share: float | None = None
    refit: RefitOptions | None = None
    cache: Literal["fp32", "bf16"] | None = None
    views: int | None = None

    @property
    def is_trained(self) -> bool:
        """Whether the run trains it, or fits its last layer."""
        return self.method != "checkpoint" or self.head == "probe"


@dataclass
class Transplant:
    """The student gets the teacher's frozen last layer behind a projector.

    Args:
        projector: see `dk.transplant`.
        init: "random"; "least_squares": a linear projector starts at the minimum of the match loss for the student's
            initial weights (`dk.fit_projector`), with the recipe's sample weights. It takes one pass over the images.
    """

    projector: Literal["depthwise", "dense", "linear", "identity"] = "depthwise"
    init: Literal["random", "least_squares"] = "random"


@dataclass
class Weights:
    """Sample weights.

    Args:
        method: "errors": mistakes of a briefly trained student count `up`, without any annotation of groups; "groups":
            every group counts alike.
        up: λ, for errors; 50 if it is left out.
        convention: for errors: "weight", a mistake weighs `up`; "copies", JTT's `up` further copies; weight by default.
        epochs: of the brief training, for errors; 1 if it is left out.
        draw: draw images with replacement and probabilities proportional to their weights instead of weighting the
            loss. That concerns all terms alike: `weighted: true` then does nothing more.
    """

    method: Literal["errors", "groups"] = "errors"
    up: float | None = None
    convention: Literal["weight", "copies"] | None = None
    epochs: int | None = None
    draw: bool = False


@dataclass
class Terms:
    """The loss: a sum of terms, each with its weight, the first epoch that it counts in, and a ramp.

    A term of your own has a name of your choice, and `of`, the import path of its class ("package.module:MyTerm").
    """

    supervised: SupervisedOptions | None = None
    match: MatchOptions | None = None
    kd: KdOptions | None = None
    sample: SampleOptions | None = None
    relation: RelationOptions | None = None
    backdoor: BackdoorOptions | None = None
    guide: GuideOptions | None = None
    explain: ExplainOptions | None = None
    own: dict[str, OwnTerm] = field(default_factory=dict, init=False)

    def given(self) -> dict[str, TermOptions]:
        """The options of all terms that there are, by name."""
        known = [(item.name, getattr(self, item.name)) for item in fields(self) if item.init]
        found = {name: options for name, options in known if options is not None}
        return found | {name: term.options for name, term in self.own.items()}

    def kind(self, name: str) -> type[Term]:
        """The class of a term.

        Raises:
            ValueError: it is one of the user's, and the recipe was read without it.
        """
        if name not in self.own:
            return TERMS[name]
        kind = self.own[name].kind
        if kind is None:
            raise ValueError(f"terms.{name}: the recipe was read without {self.own[name].of}")
        return kind

    def needs(self) -> set[str]:
        """What all of them need of a step."""
        built_in = {need for name in self.given() if name not in self.own for need in TERMS[name].needs}
        return built_in.union(*(term.needs for term in self.own.values()))


@dataclass
class Selection:
    """Which epoch is kept, by validation alone.

    Args:
        rule: "worst_group"; "worst_environment": the worst of the groups that were found (`discovery`, or a file of
            `debiaskd discover` as `data.groups`), for which no annotation is read; "accuracy" (average); "f1";
            "pareto": the front over F1 (accuracy where an image shows one class), EPG and IoU, all of which is kept,
            with the highest sum of the three in front; "last". Left out: worst_group where groups are known,
            worst_environment where they were found, else pareto for guided students, else accuracy or f1.
        every: epochs between validations. The last epoch is always validated.
        attributions: measure EPG and IoU in every validation. Left out: where the rule compares them, or guidance is.
        reuse: select the student's epoch on the very validation images that a dfr teacher's last layer was fitted on.
    """

    rule: Literal["worst_group", "worst_environment", "accuracy", "f1", "pareto", "last"] | None = None
    every: int = 1
    attributions: bool | None = None
    reuse: bool = False


@dataclass
class Recipe:
    """One run, from data to a student.

    Args:
        seed: of initial weights, order, and augmentation.
    """

    data: Data
    student: Network
    terms: Terms
    schedule: Schedule = field(default_factory=Schedule)
    teacher: Teacher | None = None
    transplant: Transplant | None = None
    discovery: Discovery | None = None
    weights: Weights | None = None
    pretraining: Schedule | None = None
    refit: Refit | None = None
    selection: Selection = field(default_factory=Selection)
    compute: Compute = field(default_factory=Compute)
    seed: int = 0

    def schedules(self) -> dict[str, Schedule]:
        """All that there are, by their keys."""
        taught = None if self.teacher is None else self.teacher.schedule
        found = {"schedule": self.schedule, "pretraining": self.pretraining, "teacher.schedule": taught}
        return {name: schedule for name, schedule in found.items() if schedule is not None}
