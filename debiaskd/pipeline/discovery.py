"""Discover groups before the stages that need them: the stages discovery and groups.

A student is trained plainly and briefly (stage `discovery`); its logits, or its features and the losses after the first
epochs, part the images of each class into groups (stage `groups`: `groups.safetensors` and `bias.csv`). Training images
are judged by a model that has seen them, which is why its training is short: once they are fitted, what contradicts the
shortcut is no longer told from the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from debiaskd.bias import FoundGroups, find_environments, find_groups
from debiaskd.data.group_files import image_names
from debiaskd.models.registry import load_weights
from debiaskd.pipeline.context import StageContext
from debiaskd.recipe import Discovery, Network, Schedule
from debiaskd.terms import SupervisedOptions, TermOptions
from debiaskd.training.batches import Split
from debiaskd.training.feature_extraction import Reading, read_outputs
from debiaskd.training.run import Stage
from debiaskd.training.schedule import brief_schedule
from debiaskd.training.validation import annotated
from debiaskd.utils import files

GROUPS = "groups"


def discovered(context: StageContext) -> Stage | None:
    """Find the groups that the recipe asks for and hand them to the splits; None if it asks for none."""
    options = context.recipe.discovery
    if options is None:
        return None
    schedule = brief_schedule(context.recipe.schedule, options.epochs)
    plain = trained_plainly(context, "discovery", schedule)
    inputs: dict[str, Any] = {"discovery": plain.fingerprint, "method": options.method}
    early = None
    if options.method == "clusters":
        early = trained_plainly(context, "discovery-early", brief_schedule(schedule, options.early))
        inputs |= {"early": early.fingerprint, "most": options.clusters, "smallest": options.smallest or 20}
    trainer = context.trainer
    splits = {"train": trainer.train, "validation": trainer.validation}

    def make(folder: Path, fingerprint: str) -> dict[str, Any]:
        found, facts = {}, {}
        for key, split in splits.items():
            read = outputs_of(context, plain, context.recipe.student, split)
            before = None if early is None else outputs_of(context, early, context.recipe.student, split)
            found[key] = groups_of(read, split.target, options, before, seed=context.recipe.seed)
            facts[key] = described(found[key], read.logits.argmax(1) == split.target, split)
        if context.fabric.is_global_zero:
            write(folder, found, splits)
        context.fabric.barrier()
        return {"method": options.method, "groups": list(trainer.train.environment_names), **facts}

    stage = context.run.stage(GROUPS, inputs, make)
    for key, split in splits.items():
        found = FoundGroups(
            split.target, *(saved(stage.folder)[f"{key}.{part}"] for part in ("clusters", "confidence"))
        )
        split.found(found.ids(options.clusters), as_groups=context.recipe.data.groups == "found")
    context.base["found groups"] = stage.fingerprint
    return stage


def trained_plainly(context: StageContext, name: str, schedule: Schedule) -> Stage:
    """The student's network, trained on the labels alone."""
    network, document = context.recipe.student, context.run.document
    inputs = {**context.base, **context.common(), **context.trainer.contracts.decisive(network)}
    inputs |= {"network": document["student"], "schedule": dict(vars(schedule))}

    def make(folder: Path, fingerprint: str) -> dict[str, Any]:
        model = context.trainer.network(network, name)
        terms: dict[str, TermOptions] = {"supervised": SupervisedOptions()}
        return context.trainer.fit(name, folder, fingerprint, model, terms, schedule, rule="last")

    return context.run.stage(name, inputs, make)


def outputs_of(context: StageContext, stage: Stage, network: Network, split: Split) -> Reading:
    """What the model that a stage has trained makes of a split's images, in order and without augmentation."""
    model = context.trainer.network(network, stage.folder.name)
    load_weights(model, stage.model)
    return outputs(context, model, network, split)


def outputs(context: StageContext, model: nn.Module, network: Network, split: Split) -> Reading:
    """The same of a model."""
    at = context.trainer.feature_layers(model, network, ("pooled",))
    loader = context.trainer.loader(split, network, training=False, batch=256, alone=True)
    return read_outputs(model.to(context.fabric.device), at, loader, context.fabric.autocast)


def groups_of(read: Reading, target: Tensor, options: Discovery, early: Reading | None, *, seed: int) -> FoundGroups:
    """The groups of a split's images, by the recipe's method."""
    if options.method == "environments":
        return find_environments(read.logits, target)
    loss = None if early is None else F.cross_entropy(early.logits, target, reduction="none")
    return find_groups(
        read.pooled, target, loss, most=options.clusters, smallest=options.smallest or 20, seed=seed % 2**32
    )


def described(found: FoundGroups, correct: Tensor, split: Split) -> dict[str, Any]:
    """Size of each group, how many of it the plain model gets right and, where groups are annotated, the agreement."""
    classes = split.whole.classes
    sizes, accuracy = {}, {}
    for (label, cluster), size in found.sizes().items():
        name = f"{classes[label]}, found-{cluster}"
        sizes[name] = size
        accuracy[name] = float(correct[(found.labels == label) & (found.clusters == cluster)].double().mean())
    facts: dict[str, Any] = {"sizes": sizes, "accuracy": accuracy}
    if annotated(split):
        assert split.groups is not None
        try:
            facts["against_known"] = found.score(split.groups)
        except ValueError:  # one known group in each class
            facts["against_known"] = None
    return facts


def write(folder: Path, found: dict[str, FoundGroups], splits: dict[str, Split]) -> None:
    """groups.safetensors, and bias.csv of all splits together."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    names: list[str] = []
    for key, groups in found.items():
        tensors |= {f"{key}.clusters": groups.clusters, f"{key}.confidence": groups.confidence}
        named = image_names(splits[key].whole)
        names += [named[number] for number in splits[key].numbers.tolist()]
    files.write(folder / "groups.safetensors", lambda path: save_file(tensors, path))
    every = FoundGroups(
        *(
            torch.cat([getattr(groups, part) for groups in found.values()])
            for part in ("labels", "clusters", "confidence")
        )
    )
    every.to_csv(folder / "bias.csv", names, splits["train"].whole.classes)


def saved(folder: Path) -> dict[str, Tensor]:
    """The tensors of a stage `groups`."""
    from safetensors.torch import load_file

    return load_file(folder / "groups.safetensors")
