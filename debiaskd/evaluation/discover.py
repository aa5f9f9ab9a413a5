"""What a plainly trained model makes of a prepared split: its logits and features, and the groups that they show."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from debiaskd.bias import FoundGroups, find_environments, find_groups
from debiaskd.evaluation.evaluate import LoadedStage
from debiaskd.models.input import InputContract, default_contract
from debiaskd.recipe import Data, Recipe, RecipeError
from debiaskd.terms import Ranks
from debiaskd.training.batches import Split, SplitLoader, open_split
from debiaskd.training.fabric import autocast
from debiaskd.training.feature_extraction import Reading, find_feature_layers, read_outputs
from debiaskd.training.run import STAGE, RunError, open_run
from debiaskd.utils import checks

METHODS = ("environments", "clusters")
#: Stages whose models were trained plainly, in the order in which `plain_stage` prefers them.
PLAIN = ("discovery", "identification", "teacher-identification", "teacher-erm", "pretraining")
#: Of these, those that were trained briefly.
BRIEF = ("discovery-early", "identification", "teacher-identification")


@dataclass(frozen=True)
class Judge:
    """A model, and how it reads images.

    Attributes:
        model: in evaluation mode, on `device`.
        contract: what it reads.
        layer, head: names of its last feature map and of its last layer, where they are not found.
        autocast: makes the context that it runs in.
        name: for people.
    """

    model: nn.Module
    contract: InputContract
    device: torch.device
    layer: str | None = None
    head: str | None = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    name: str = "model"

    def loader(self, split: Split, batch: int = 64) -> SplitLoader:
        """The split's images as the model reads them, in order."""
        data = Data(str(split.whole.path))
        options: dict[str, Any] = {"ranks": Ranks(), "device": self.device, "contract": self.contract}
        return SplitLoader(split, data, training=False, batch=batch, **options)

    def outputs(self, split: Split) -> Reading:
        """Logits [N,K] and pooled features [N,D] of a split's images."""
        model = copy.deepcopy(self.model)  # what is watched keeps hooks
        try:
            at = find_feature_layers(model, self.contract.example().to(self.device), self.layer, self.head, ("pooled",))
        except (ValueError, TypeError) as error:
            raise RunError(f"{self.name}: {error}") from None
        return read_outputs(model, at, self.loader(split, 256), self.autocast)


def of_run(folder: Path, stage: str | None = None, data: str | None = None) -> Judge:
    """The plainly trained model of a run.

    Args:
        folder: of the run.
        stage: whose model; None: `plain_stage`.
        data: where the prepared data lies now.
    """
    loaded = LoadedStage(folder, stage or plain_stage(folder), data)
    network, compute = loaded.network, loaded.recipe.compute
    return Judge(
        loaded.model,
        loaded.contract,
        loaded.device,
        None if loaded.name == "student" else network.layer,
        None if loaded.name == "student" else network.named_head,
        partial(autocast, compute, loaded.device),
        f"{loaded.name} of {folder}",
    )


def of_module(model: nn.Module, size: tuple[int, int], contract: InputContract | None = None) -> Judge:
    """A model of the user's, from images to logits [N,K].

    Args:
        model: stays as it is, apart from being in evaluation mode.
        size: (height, width) of the prepared images.
        contract: what it reads; None: the mean and std of its `pretrained_cfg`, as timm's models have one, or
            ImageNet's.
    """
    if contract is None:
        contract, config = default_contract("", size), getattr(model, "pretrained_cfg", None)
        if isinstance(config, dict) and {"mean", "std"} <= set(config):
            contract = replace(contract, mean=tuple(config["mean"]), std=tuple(config["std"]))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Judge(model.eval(), contract, device, name=type(model).__name__)


def plain_stage(folder: Path) -> str:
    """The stage of a run whose model was trained on the labels alone, the most brief ones first.

    Raises:
        RunError: there is none.
    """
    recipe = open_run(folder)
    for name in PLAIN:
        if (folder / name / STAGE).is_file():
            return name
    if (folder / "student" / STAGE).is_file() and _plain(recipe):
        return "student"
    raise RunError(
        f"{folder}: has no model that was trained plainly (stages {', '.join(PLAIN)}, or a student of terms.supervised "
        "alone); name a stage, or discover the data itself"
    )


def _plain(recipe: Recipe) -> bool:
    terms = [name for name, options in vars(recipe.terms).items() if options is not None]
    return terms == ["supervised"] and recipe.weights is None and recipe.transplant is None


def brief_stage(folder: Path, but: str) -> str | None:
    """A stage whose model was trained briefly, for early losses; None if there is none other than `but`."""
    return next((name for name in BRIEF if name != but and (folder / name / STAGE).is_file()), None)


def opened(data: Data, split: str) -> Split:
    """A split by its name, with the groups that it was prepared with.

    Raises:
        RecipeError: there is none, or its images may show several classes.
    """
    found = open_split(replace(data, test=split), "test")
    if found.whole.multi_label:
        raise RecipeError(f"{data.path}: discovery needs one class an image, here it may be several")
    return found


def early_losses(judge: Judge, split: Split) -> Tensor:
    """Cross-entropy [N] of a briefly trained model."""
    return F.cross_entropy(judge.outputs(split)[0], split.target, reduction="none")


def find(
    logits: Tensor, pooled: Tensor, split: Split, method: str, early_loss: Tensor | None, **options: Any
) -> FoundGroups:
    """The groups of a split's images, by a method's name.

    Raises:
        ValueError: no such method, or a model of fewer classes than the data has.
    """
    checks.option("method", method, METHODS)
    if logits.shape[1] < split.num_classes:
        raise ValueError(f"model must give logits of K={split.num_classes} classes, got {logits.shape[1]}")
    if method == "environments":
        return find_environments(logits, split.target)
    return find_groups(pooled, split.target, early_loss, **options)
