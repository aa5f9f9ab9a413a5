"""Fit a teacher's last layer on the training images (`teacher.head: probe`).

A network without a classifier (DINO, CLIP's image tower), or with one of other classes, is built with a random last
layer. This stage fits that layer alone: logistic regression on the standardised features that it reads, with the
strength of regularisation chosen on a held-out fifth of the training images.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from debiaskd.models.registry import save_weights
from debiaskd.pipeline.context import StageContext
from debiaskd.pipeline.weights import read_weights, sample_weights
from debiaskd.recipe import Teacher
from debiaskd.reweight import group_weights
from debiaskd.training.feature_extraction import read_outputs
from debiaskd.training.head_weights import find_head, linear_layers, put
from debiaskd.training.run import Stage
from debiaskd.utils import files

#: Inverse strengths of L2 regularisation that are tried.
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)


def probed(context: StageContext, options: Teacher) -> Stage:
    """The stage that fits a teacher's last layer to the training images."""
    by = options.probe or "plain"
    inputs = {**context.base, **context.common(), **context.trainer.contracts.decisive(options)}
    inputs |= {"teacher": [options.name, options.pretrained], "head": "probe", "by": by}
    weight = None
    if by == "groups":
        groups = context.trainer.train.groups
        assert groups is not None
        weight = group_weights(groups)
    elif by == "weights":
        stage = sample_weights(context)
        inputs["weights"] = stage.fingerprint
    older = dict(inputs)
    inputs["network"] = [options.bias_free, options.layer, options.options]

    def make(folder: Path, fingerprint: str) -> dict[str, Any]:
        each = read_weights(stage) if by == "weights" else weight
        model = context.trainer.network(options, "teacher").to(context.fabric.device).eval()
        facts = _fit_into(context, options, model, each)
        if context.fabric.is_global_zero:
            about = context.trainer.about("teacher", options)
            files.write(folder / "model.safetensors", lambda path: save_weights(model, path, about))
        context.fabric.barrier()
        return facts

    return context.run.stage("teacher", inputs, make, older=older)


def _fit_into(context: StageContext, options: Teacher, model: nn.Module, weight: Tensor | None) -> dict[str, Any]:
    trainer = context.trainer
    example = trainer.example(options).to(context.fabric.device)
    loader = trainer.loader(trainer.train, options, training=False, batch=256, alone=True)
    feature = read_outputs(model, trainer.feature_layers(model, options, ("pooled",)), loader).pooled
    target = trainer.train.target
    r, _ = find_head(model, example)
    bias = all(getattr(layer, "bias", None) is not None for layer in linear_layers(model, r))
    made, offset, strength, right = fit(feature, target, weight, bias=bias, seed=context.recipe.seed)
    put(model, r, example, made, offset if bias else None)
    return {"fitted_on": len(feature), "strength": strength, "held_out_accuracy": right, "by": options.probe or "plain"}


def fit(
    feature: Tensor, target: Tensor, weight: Tensor | None, *, bias: bool = True, seed: int = 0
) -> tuple[Tensor, Tensor, float, float]:
    """(weight [K,D], bias [K], the strength that was chosen, accuracy on the fifth that was held out to choose it).

    Args:
        feature: [N,D]. target: int64 [N], or [N,K] of 0 and 1. weight: [N], what each counts; None: all alike.
        bias: whether the layer has one.
        seed: of the fifth.
    """
    weight = torch.ones(len(feature)) if weight is None else weight / weight.mean()
    mean = feature.mean(0) if bias else torch.zeros(feature.shape[1])
    deviation = feature.std(0).clamp(min=1e-6)
    feature = (feature - mean) / deviation
    order = torch.randperm(len(feature), generator=torch.Generator().manual_seed(seed))
    held, rest = order[: len(order) // 5], order[len(order) // 5 :]

    def right(strength: float) -> float:
        made, offset = _solve(feature[rest], target[rest], weight[rest], strength, bias)
        scores = feature[held] @ made.T + offset
        hits = (scores.argmax(1) == target[held]) if target.dim() == 1 else ((scores > 0) == target[held].bool())
        hits = hits.float() if target.dim() == 1 else hits.float().mean(1)
        return float((weight[held] * hits).sum() / weight[held].sum())

    if len(held) == 0 or (target.dim() == 1 and len(target[rest].unique()) < len(target.unique())):
        strength, best = 1.0, float("nan")
    else:
        tried = {strength: right(strength) for strength in STRENGTHS}
        strength = max(STRENGTHS, key=lambda c: tried[c])
        best = tried[strength]
    made, offset = _solve(feature, target, weight, strength, bias)
    made = made / deviation
    return made, offset - made @ mean, strength, best


def _solve(feature: Tensor, target: Tensor, weight: Tensor, strength: float, bias: bool) -> tuple[Tensor, Tensor]:
    from sklearn.linear_model import LogisticRegression

    def solved(labels: Tensor) -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fit that ends early is as good as the next strength's
            solver = LogisticRegression(C=strength, max_iter=500, fit_intercept=bias)
            solver.fit(feature.numpy(), labels.numpy(), sample_weight=weight.numpy())
        coefficients = torch.from_numpy(solver.coef_).float()
        return coefficients, torch.from_numpy(solver.intercept_).float().expand(len(coefficients))

    if target.dim() == 1:
        coefficients, intercept = solved(target)
        if len(coefficients) == 1:  # of two classes, scikit-learn keeps the second's
            return torch.cat([-coefficients, coefficients]) / 2, torch.cat([-intercept, intercept]) / 2
        return coefficients, intercept
    pairs = []
    for labels in target.T:
        if labels.unique().numel() < 2:
            constant = 10.0 if bool(labels.any()) else -10.0
            pairs.append((torch.zeros(1, feature.shape[1]), torch.full((1,), constant if bias else 0.0)))
        else:
            pairs.append(solved(labels.long()))
    return torch.cat([one for one, _ in pairs]), torch.cat([one for _, one in pairs])
