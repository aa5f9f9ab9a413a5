"""The input contracts of a recipe's networks."""

from __future__ import annotations

from typing import Any

from debiaskd.models.input import InputContract, default_contract
from debiaskd.models.input_sources import resolve
from debiaskd.models.weight_files import weights_file
from debiaskd.recipe import Network, Recipe, Teacher


class InputContracts:
    """The input contracts of student and teacher.

    Args:
        recipe: as checked.
        prepared: (height, width) of the prepared images.
    """

    def __init__(self, recipe: Recipe, prepared: tuple[int, int]) -> None:
        self.prepared, self.side = prepared, recipe.data.size or prepared[0]
        self.found: dict[str, InputContract] = {}
        self.lines: list[str] = []
        for key, network in (("student", recipe.student), ("teacher", recipe.teacher)):
            if network is None:
                continue
            self.found[key], source = resolve(
                network.name,
                prepared,
                asked=None if network.input is None else vars(network.input),
                data_size=recipe.data.size,
                pretrained=network.pretrained,
                weights=None if network.weights is None else weights_file(network.weights),
                options=network.options,
            )
            self.lines.append(f"input of the {key}: {self.found[key]} ({source})")

    @property
    def teacher(self) -> InputContract | None:
        return self.found.get("teacher")

    def new_messages(self) -> list[str]:
        """One line per network on the first call, none afterwards."""
        lines, self.lines = self.lines, []
        return lines

    def of(self, network: Network) -> InputContract:
        """The input contract of one of the recipe's networks."""
        return self.found[_key(network)]

    def decisive(self, *networks: Network) -> dict[str, Any]:
        """The contracts as fingerprint inputs of a stage. A contract that equals the default of runs
        from before there were contracts is left out, so that those runs can be resumed."""
        found = {}
        for network in networks:
            contract, default = self.of(network), default_contract(network.name, (self.side, self.side))
            if not contract.same_as(default, resized=contract.size != self.prepared):
                found[f"{_key(network)}.input"] = contract.to_dict()
        return found

    def about(self, stage: str, network: Network) -> dict[str, Any]:
        """The contracts that a stage's weights carry: the network's, and that of the teacher whose head a student may
        have."""
        found: dict[str, Any] = {"size": self.of(network).size[0], "input": self.of(network).to_dict()}
        if stage == "student" and self.teacher is not None:
            found["teacher_input"] = self.teacher.to_dict()
        return found


def _key(network: Network) -> str:
    return "teacher" if isinstance(network, Teacher) else "student"
