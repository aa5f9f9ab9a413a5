"""Build the networks of a recipe, from their names, files of weights and runs."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.models.depths import check_layer
from debiaskd.models.input import InputContract
from debiaskd.models.registry import build, load_weights, prepare, pretrained_classes
from debiaskd.recipe import Network, Recipe, RecipeError, Teacher
from debiaskd.training.batches import Split
from debiaskd.training.feature_extraction import FeatureLayers, find_feature_layers
from debiaskd.training.head_weights import from_file
from debiaskd.training.input_contracts import InputContracts
from debiaskd.training.rebuild import starting_network
from debiaskd.training.run import ProgressCallback


class Networks:
    """The networks of one recipe, and what they read.

    Args:
        recipe: as checked.
        train: the training split, whose classes they are built for.
        progress: is told what was loaded from files of weights.

    Raises:
        NetworkError: a recipe that names another network than the run that its weights come from.
    """

    def __init__(self, recipe: Recipe, train: Split, progress: ProgressCallback) -> None:
        self.recipe, self.train, self.progress = recipe, train, progress
        self.contracts = InputContracts(recipe, train.whole.size)
        self._reported: set[tuple[str, str]] = set()
        networks = {"student": recipe.student, "teacher": recipe.teacher}
        self.starting_networks = {
            name: None if network is None else starting_network(name, network, recipe)
            for name, network in networks.items()
        }

    def contract(self, network: Network) -> InputContract:
        """The input contract of one of the recipe's networks."""
        return self.contracts.of(network)

    def network(self, options: Network, purpose: str) -> nn.Module:
        """Build a network; its initial weights depend on the recipe's seed and `purpose`, or come from a file."""
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
        """Report once what was loaded from a file of weights, although a network may be built several times."""
        if taken and (purpose, path) not in self._reported:
            self._reported.add((purpose, path))
            self.progress(purpose, 0.0, f"weights {path}: {taken}")

    def about(self, stage: str, network: Network) -> dict[str, Any]:
        """Metadata for a file of weights."""
        found = {"stage": stage, "classes": list(self.train.whole.classes), **self.contracts.about(stage, network)}
        starting_networks = {name: base.kept() for name, base in self.starting_networks.items() if base is not None}
        if any(starting_networks.values()):
            found["bases"] = {name: base for name, base in starting_networks.items() if base is not None}
        return found

    def load_projector(self, model: nn.Module) -> None:
        """Load the projector of the run that the student starts from, if its shape fits."""
        base, path = self.starting_networks.get("student"), self.recipe.student.weights
        if base is not None and path is not None and base.new_head:
            base.load_projector(model, path)

    def example(self, options: Network) -> Tensor:
        """A random input [1,C,H,W] of a network."""
        return self.contract(options).example()

    def feature_layers(self, model: nn.Module, options: Network, wanted: Iterable[str]) -> FeatureLayers:
        """Where a network's features are; see `debiaskd.training.feature_extraction.find_feature_layers`."""
        try:
            return find_feature_layers(model, self.example(options), options.layer, options.named_head, wanted)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{options.name}: {error}") from None


def role(network: Network) -> str:
    return "teacher" if isinstance(network, Teacher) else "student"
