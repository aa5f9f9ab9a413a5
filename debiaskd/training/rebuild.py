"""Rebuild the network of a finished run, for evaluation or as a teacher.

A student is more than its network's name says: it may have a transplanted head, and CID's intervention; and the network
that it began from may have been such a student itself.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.models.frozen_teacher import FrozenTeacher
from debiaskd.models.input import InputContract, of_weights
from debiaskd.models.registry import NetworkError, build, load_weights, prepare, weights_file
from debiaskd.models.transplant import transplant
from debiaskd.models.weight_reading import read
from debiaskd.recipe import Data, Network, Recipe, RecipeError, Teacher, Terms, Transplant
from debiaskd.terms import BackdoorOptions
from debiaskd.terms.backdoor import Intervened, Intervention
from debiaskd.training.feature_extraction import find_feature_layers
from debiaskd.training.run import STAGE, RunError, open_run
from debiaskd.training.teacher_outputs import FrozenExtractor

#: The stage of a student whose last layer is refitted, before that.
BEFORE_REFIT = "student-before-refit"


@dataclasses.dataclass(frozen=True)
class Design:
    """How to build a network of a run.

    Attributes:
        recipe: of the run.
        about: metadata of its weights file.
        role: "student" or "teacher", whose network it is.
        whole: with what training put around the student's network.
        intervened: with CID's second head; an epoch before the contexts were built may have been the best.
    """

    recipe: Recipe
    about: Mapping[str, Any]
    role: str
    whole: bool
    intervened: bool

    @property
    def network(self) -> Network:
        network = self.recipe.teacher if self.role == "teacher" else self.recipe.student
        assert network is not None
        return network

    @property
    def contract(self) -> InputContract:
        return of_weights(self.about, self.network.name)

    @property
    def transplanted(self) -> bool:
        return self.whole and self.recipe.transplant is not None

    @property
    def plain(self) -> bool:
        """Whether the registered network alone describes it."""
        return not (self.transplanted or self.intervened or self._base(self.role))

    def build(self, contract: InputContract | None = None) -> nn.Module:
        """Build the network with arbitrary weights.

        Args:
            contract: what it is to read; None: what it was trained with.
        """
        recipe, contract = self.recipe, contract or self.contract
        model, example = self.bare(contract), contract.example()
        if self.transplanted and recipe.teacher is not None:
            reads = of_weights(self.about, recipe.teacher.name, "teacher_input")
            source = self._bare("teacher", recipe.teacher, reads)
            model = transplanted(recipe, frozen(source, recipe.teacher, reads.example()), model, example)
        if self.intervened:
            options = recipe.terms.backdoor
            assert options is not None
            width = find_feature_layers(
                model, example, recipe.student.layer, recipe.student.named_head, ("pooled",)
            ).pooled_width
            model = Intervened(model, Intervention(width, self.classes, options.mode, options.temperature))
        return model

    @property
    def classes(self) -> int:
        return len(self.about["classes"])

    def described(self) -> str:
        """In words."""
        parts = [self.network.name]
        if self.transplanted and self.recipe.teacher is not None:
            parts.append(f"with the head of {self.recipe.teacher.name}")
        if self.intervened:
            parts.append("with CID's intervention")
        return " ".join(parts)

    def bare(self, contract: InputContract, classes: int | None = None) -> nn.Module:
        """The network alone, with a last layer for as many classes as the run's, or for others."""
        return self._bare(self.role, self.network, contract, classes)

    def inner(self) -> Design | None:
        """The design of the network without its head, where the registered network alone does not describe it."""
        base = self._base(self.role)
        return None if base is None else Design.from_dict(base)

    def _bare(self, role: str, network: Network, contract: InputContract, classes: int | None = None) -> nn.Module:
        base = self._base(role)
        if base is not None:
            return Design.from_dict(base).build(contract)
        with torch.random.fork_rng(devices=[]):
            model = build(network.name, classes or self.classes, size=contract.size, options=network.options)
        return prepare(model, contract, x_dnn=network.bias_free)

    def _base(self, role: str) -> Mapping[str, Any] | None:
        return self.about.get("bases", {}).get(role)  # type: ignore[no-any-return]

    def to_dict(self) -> dict[str, Any]:
        """JSON, which `from_dict` takes."""
        recipe = self.recipe
        parts: dict[str, Any] = {"student": recipe.student, "teacher": recipe.teacher}
        parts |= {"transplant": recipe.transplant, "backdoor": recipe.terms.backdoor}
        options = {name: None if part is None else dataclasses.asdict(part) for name, part in parts.items()}
        found = {"recipe": options, "about": dict(self.about), "role": self.role, "whole": self.whole}
        return json.loads(json.dumps({**found, "intervened": self.intervened}))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Design:
        options = document["recipe"]
        recipe = Recipe(
            Data(""),
            _made(Network, options["student"]),
            Terms(backdoor=_made(BackdoorOptions, options["backdoor"])),
            teacher=_made(Teacher, options["teacher"]),
            transplant=_made(Transplant, options["transplant"]),
        )
        return cls(recipe, document["about"], document["role"], document["whole"], document["intervened"])


def _made(cls: type, options: Mapping[str, Any] | None) -> Any:
    """A dataclass of those of its keys that building a network reads."""
    if options is None:
        return None
    names = {field.name for field in dataclasses.fields(cls)} - {"input", "schedule"}
    return cls(**{name: value for name, value in options.items() if name in names})


def design_of_file(path: Path | str) -> Design | None:
    """The design of the network whose weights these are; None where no run's folder holds them.

    Raises:
        RunError: it is a run's, whose recipe cannot be read.
    """
    file = weights_file(path)
    stage = next((folder for folder in (file.parent, file.parent.parent) if (folder / STAGE).is_file()), None)
    if stage is None or file.suffix != ".safetensors" or not file.is_file():
        return None
    if not (stage.parent / "recipe.yaml").is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            about, names = json.loads(opened.metadata()["debiaskd"]), set(opened.keys())
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
    return design_of_stage(open_run(stage.parent), about, stage.name, names)


def design_of_stage(recipe: Recipe, about: Mapping[str, Any], stage: str, names: set[str]) -> Design:
    """The design of a stage's network.

    Args:
        recipe: of the run.
        about: metadata of its weights file.
        stage: its name.
        names: of the tensors in that file.
    """
    role = "teacher" if stage.startswith("teacher") and recipe.teacher is not None else "student"
    whole = stage in ("student", BEFORE_REFIT)
    intervened = whole and recipe.terms.backdoor is not None and any(name.startswith("intervention.") for name in names)
    return Design(recipe, about, role, whole, intervened)


@dataclasses.dataclass(frozen=True)
class StartingNetwork:
    """The network of a run that a recipe's network starts from.

    Attributes:
        design: of the run's network.
        new_head: only its body is used, and its projector where that fits: the recipe gives it another head.
    """

    design: Design
    new_head: bool

    def kept(self) -> dict[str, Any] | None:
        """The design as JSON, for the metadata of networks that start from this one."""
        design = self.design.inner() if self.new_head else self.design
        return None if design is None else design.to_dict()

    def load_projector(self, model: nn.Module, path: str) -> None:
        """Load the run's projector into a newly transplanted student, if the shapes match."""
        state, own = self._state(path), model.state_dict()
        there = {name: tensor for name, tensor in state.items() if name.startswith("projector.")}
        here = {name: tensor for name, tensor in own.items() if name.startswith("projector.")}
        if {n: t.shape for n, t in there.items()} == {n: t.shape for n, t in here.items()}:
            model.load_state_dict({**own, **there})

    def _state(self, path: str) -> dict[str, Tensor]:
        """The transplanted student's tensors, without the intervention around it."""
        state: dict[str, Tensor] = read(weights_file(path))
        return (
            {name.removeprefix("student."): tensor for name, tensor in state.items()}
            if self.design.intervened
            else state
        )

    def begin(self, path: str, contract: InputContract, classes: int) -> tuple[nn.Module, str]:
        """(the network, what was taken of the run in one line)."""
        design, name = self.design, self.design.network.name
        if not self.new_head:
            if design.classes != classes:
                raise NetworkError(
                    f"{path}: its {name} knows {design.classes} classes and the data has {classes}; a head that it was "
                    "given cannot be re-initialised"
                )
            model = design.build(contract)
            load_weights(model, path)
            return model, f"took the whole {design.role} of a run, {design.described()}"
        model, body = design.bare(contract, classes), "body.model."
        own, state = model.state_dict(), self._state(path)
        found = {key.removeprefix(body): tensor for key, tensor in state.items() if key.startswith(body)}
        model.load_state_dict({**own, **{key: tensor for key, tensor in found.items() if key in own}})
        return model, f"took the body of a run's student, {name}; its head is the teacher's"


def starting_network(key: str, network: Network, recipe: Recipe) -> StartingNetwork | None:
    """The run's network that a recipe's network starts from, where the registered network alone does not describe it.

    Args:
        key: "student" or "teacher".
        network: of the recipe.
        recipe: which may give its student another head.

    Raises:
        NetworkError: the recipe names another network than the run has.
    """
    if network.weights is None:
        return None
    try:
        design = design_of_file(network.weights)
    except RunError as error:
        raise NetworkError(f"{key}.weights: {error}") from None
    if design is None or design.plain:
        return None
    there = design.network
    for name in ("name", "bias_free", "options"):
        if getattr(network, name) != getattr(there, name):
            asked, found = getattr(network, name), getattr(there, name)
            raise NetworkError(f"{key}.{name}: must be {found}, as {network.weights} has it, got {asked}")
    return StartingNetwork(design, new_head=key == "student" and recipe.transplant is not None and design.transplanted)


def frozen(model: nn.Module, network: Network, example: Tensor) -> FrozenTeacher:
    """A teacher to be transplanted, whose layers need not be named."""
    try:
        return FrozenTeacher(model, layer=network.layer, head=network.named_head, example=example)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"teacher: {error}") from None


def observed(model: nn.Module, network: Network, example: Tensor, wanted: Iterable[str]) -> FrozenExtractor:
    """A teacher without a cut, from which nothing is read but what is wanted, any of "feature" and "pooled"."""
    try:
        at = find_feature_layers(model, example, network.layer, network.named_head, wanted) if wanted else None
    except (ValueError, TypeError) as error:
        raise RecipeError(f"teacher: {error}") from None
    return FrozenExtractor(model, at, wanted)


def transplanted(recipe: Recipe, teacher: FrozenTeacher, student: nn.Module, example: Tensor) -> nn.Module:
    """The student with the teacher's head; the projector's initial weights come from the global generator."""
    assert recipe.transplant is not None
    layer = recipe.student.layer
    try:
        names = None if layer is None else (None, layer)
        return transplant(teacher, student, projector=recipe.transplant.projector, layer=names, example=example)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"transplant: {error}") from None
