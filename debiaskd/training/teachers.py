"""Debiased teachers that are trained here: erm, balanced, group_dro, jtt, dfr.

`dfr` is debiased in its last layer alone, its features stay what the labels made of them (Kirichenko et al. 2023,
arXiv 2204.02937): the layer is fitted anew on half of the validation pictures, with as many of each group.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from debiaskd import files
from debiaskd.networks import load_weights, save_weights
from debiaskd.recipe import RecipeError, Teacher
from debiaskd.reweight import error_weights, group_weights
from debiaskd.terms import GroupDroOptions, SupervisedOptions, TermOptions
from debiaskd.training.schedule import brief

if TYPE_CHECKING:
    from debiaskd.training.run import Stage
    from debiaskd.training.stages import Chain

#: Of DFR: balanced samples whose fits are averaged, and the strengths of L1 regularisation that are tried.
FITS, STRENGTHS = 10, (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)


def trained_teacher(chain: Chain, options: Teacher) -> Stage:
    """The stage that trained it."""
    assert options.schedule is not None
    groups, schedule = chain.fitting.train.groups, options.schedule
    terms: dict[str, TermOptions] = {"supervised": SupervisedOptions()}
    weight: Callable[[], Tensor] | None = None  # not before the stage that needs it is made
    sampling = None
    inputs = {**chain.base, **chain.common(), **chain.fitting.inputs(options)}
    inputs["teacher"] = dataclasses.asdict(options)
    if options.method in ("balanced", "group_dro"):
        assert groups is not None
        sampling = group_weights(groups)  # group DRO draws its groups alike, too (Sagawa et al. 2020, algorithm 1)
    if options.method == "group_dro":
        step_size = 0.01 if options.step_size is None else options.step_size
        terms = {"group_dro": GroupDroOptions(step_size=step_size)}
    elif options.method == "jtt":
        assert options.up is not None
        identification = brief(schedule, options.identification_epochs)
        correct, fingerprint = chain.identified("teacher-identification", options, identification)
        inputs["identification"] = fingerprint
        terms = {"supervised": SupervisedOptions(weighted=True)}
        up = options.up

        def weight() -> Tensor:
            return chain.spread(error_weights(correct(), up))

    name = "teacher-erm" if options.method == "dfr" else "teacher"
    if options.method == "dfr":
        inputs["teacher"]["method"] = "erm"  # which it is so far

    def make(folder: Path, fingerprint: str) -> dict[str, Any]:
        return chain.fitting.fit(
            name,
            folder,
            fingerprint,
            chain.fitting.network(options, "teacher"),
            terms,
            schedule,
            weight=None if weight is None else weight(),
            sampling=sampling,
            network=options,
        )

    stage = chain.run.stage(name, inputs, make)
    return stage if options.method != "dfr" else _refitted(chain, options, stage)


def _refitted(chain: Chain, options: Teacher, erm: Stage) -> Stage:
    def make(folder: Path, fingerprint: str) -> dict[str, Any]:
        model = chain.fitting.network(options, "teacher").to(chain.fabric.device).eval()
        load_weights(model, erm.model)
        classifier: Any = model.get_submodule(chain.fitting.places(model, options).classifier)
        facts = _refit(chain, options, model, classifier)
        if chain.fabric.is_global_zero:
            about = chain.fitting.about("teacher", options)
            files.write(folder / "model.safetensors", lambda path: save_weights(model, path, about))
        chain.fabric.barrier()
        return facts

    return chain.run.stage("teacher", {"erm": erm.fingerprint, "method": "dfr", "fits": FITS}, make)


def _refit(chain: Chain, options: Teacher, model: nn.Module, classifier: nn.Linear) -> dict[str, Any]:
    feature, target, groups = _features(chain, options, model, classifier)
    if len(target.unique()) < max(classifier.out_features, 2):
        raise RecipeError("teacher.method: dfr needs validation pictures of every class, and two classes")
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(chain.recipe.seed))
    fitted, held = order[: len(order) // 2], order[len(order) // 2 :]
    mean, deviation = feature[fitted].mean(0), feature[fitted].std(0).clamp(min=1e-6)
    feature = (feature - mean) / deviation
    strength = max(
        STRENGTHS,
        key=lambda c: _worst(
            _fit(feature[fitted], target[fitted], groups[fitted], c, fits=1), feature[held], target[held], groups[held]
        ),
    )
    weight, bias = _fit(feature[fitted], target[fitted], groups[fitted], strength, fits=FITS)
    with torch.no_grad():
        classifier.weight.copy_(weight / deviation)
        classifier.bias.copy_(bias - (weight / deviation) @ mean)
    worst = _worst((weight, bias), feature[held], target[held], groups[held])
    return {"strength": strength, "fitted_on": len(fitted), "worst_group_accuracy_of_the_other_half": worst}


def _features(chain: Chain, options: Teacher, model: nn.Module, classifier: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """What the last layer reads, of all validation pictures, in float64."""
    caught: list[Tensor] = []
    handle = classifier.register_forward_pre_hook(lambda module, arguments: caught.append(arguments[0].double().cpu()))
    pictures = chain.fitting.pictures(chain.fitting.validation, options, training=False, batch=256, alone=True)
    with torch.no_grad():
        for batch in pictures.batches:
            model(pictures.placed(batch).images)
    handle.remove()
    groups = chain.fitting.validation.groups
    assert groups is not None
    return torch.cat(caught), chain.fitting.validation.target, groups


def _fit(feature: Tensor, target: Tensor, groups: Tensor, strength: float, fits: int) -> tuple[Tensor, Tensor]:
    from sklearn.linear_model import LogisticRegression

    least = int(groups.bincount()[groups.unique()].min())
    weights, biases = [], []
    for number in range(fits):
        generator = torch.Generator().manual_seed(number)
        chosen = []
        for group in groups.unique():
            members = (groups == group).nonzero()[:, 0]
            chosen.append(members[torch.randperm(len(members), generator=generator)[:least]])
        rows = torch.cat(chosen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scikit-learn, whose names for L1 change; and of fits that end early
            solver = LogisticRegression(
                penalty="l1", C=strength, solver="saga", max_iter=300, tol=1e-3, random_state=number
            )
            solver.fit(feature[rows].numpy(), target[rows].numpy())
        weight, bias = torch.from_numpy(solver.coef_), torch.from_numpy(solver.intercept_)
        if len(weight) == 1:  # of two classes, scikit-learn keeps the second's
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        weights.append(weight)
        biases.append(bias)
    return torch.stack(weights).mean(0), torch.stack(biases).mean(0)


def _worst(fitted: tuple[Tensor, Tensor], feature: Tensor, target: Tensor, groups: Tensor) -> float:
    weight, bias = fitted
    right = (feature @ weight.T + bias).argmax(1) == target
    return min(float(right[groups == group].double().mean()) for group in groups.unique())
