"""Last layers for teachers without one for the data's classes: fitted on the training pictures, or read from a file.

A network without a classifier (DINO, CLIP's image tower), or with one of other classes, is built with a random last
layer. `teacher.head: probe` fits that layer alone: logistic regression on what it reads, standardised, its strength of
regularisation chosen on a fifth of the training pictures. A file of safetensors gives it as `weight` [K,D] and, if it
has one, `bias` [K]: zero-shot text embeddings, scaled.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from debiaskd.models.cut import share
from debiaskd.models.last_layers import Reading, last_layers, reading
from debiaskd.models.registry import NetworkError, save_weights
from debiaskd.recipe import RecipeError, Teacher
from debiaskd.reweight import group_weights
from debiaskd.training.feature_extraction import Watched
from debiaskd.utils import files

if TYPE_CHECKING:
    from debiaskd.pipeline.stages import Chain
    from debiaskd.training.run import Stage

#: Inverse strengths of L2 regularisation that are tried.
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)


def from_file(model: nn.Module, example: Tensor, path: str) -> None:
    """Puts the head of a file into a model's last layers.

    Raises:
        RecipeError: no such file, no such tensors, of other shapes, or layers that cannot hold it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RecipeError(
            f"teacher.head: {path}: not readable as safetensors ({' '.join(str(error).split())})"
        ) from None
    r, (z, _, logits) = _ends(model, example)
    shape = [logits.shape[1], z.shape[1]]
    weight, bias = found.get("weight"), found.get("bias")
    if weight is None or list(weight.shape) != shape:
        got = f"tensors {sorted(found)}" if weight is None else f"{list(weight.shape)}"
        raise RecipeError(f"teacher.head: {path}: must hold weight [K,D]={shape}, got {got}")
    if bias is not None and list(bias.shape) != shape[:1]:
        raise RecipeError(f"teacher.head: {path}: bias must be [K]={shape[:1]}, got {list(bias.shape)}")
    put(model, r, example, weight, bias)


def probed(chain: Chain, options: Teacher) -> Stage:
    """The stage that fitted a teacher's last layer to the training pictures."""
    by, inputs = options.probe or "plain", {**chain.base, **chain.common(), **chain.fitting.contracts.decisive(options)}
    inputs |= {"teacher": [options.name, options.pretrained], "head": "probe", "by": by}
    weight = None
    if by == "groups":
        groups = chain.fitting.train.groups
        assert groups is not None
        weight = group_weights(groups)
    elif by == "weights":
        stage = chain.weights()
        inputs["weights"] = stage.fingerprint

    def make(folder: Path, fingerprint: str) -> dict[str, Any]:
        from safetensors.torch import load_file

        each = load_file(stage.folder / "weights.safetensors")["weights"] if by == "weights" else weight
        model = chain.fitting.network(options, "teacher").to(chain.fabric.device).eval()
        facts = _fit_into(chain, options, model, each)
        if chain.fabric.is_global_zero:
            about = chain.fitting.about("teacher", options)
            files.write(folder / "model.safetensors", lambda path: save_weights(model, path, about))
        chain.fabric.barrier()
        return facts

    return chain.run.stage("teacher", inputs, make)


def check(model: nn.Module, example: Tensor) -> None:
    """Raises RecipeError if a model's last layers cannot hold a head that is fitted."""
    r, (z, _, logits) = _ends(model, example)
    put(share(model), r, example, torch.zeros(logits.shape[1], z.shape[1]), None, dry=True)


def _fit_into(chain: Chain, options: Teacher, model: nn.Module, weight: Tensor | None) -> dict[str, Any]:
    fitting = chain.fitting
    example = fitting.example(options).to(chain.fabric.device)
    watched = Watched(model, fitting.places(model, options, ("pooled",)), ("pooled",)).eval()
    pictures = fitting.pictures(fitting.train, options, training=False, batch=256, alone=True)
    found = []
    with torch.no_grad():
        for batch in pictures.batches:
            pooled = watched(pictures.placed(batch).images)[0].pooled
            assert pooled is not None
            found.append(pooled.float().cpu())
    feature, target = torch.cat(found), fitting.train.target
    r, _ = _ends(model, example)
    bias = all(getattr(layer, "bias", None) is not None for layer in _layers(model, r))
    made, offset, strength, right = fit(feature, target, weight, bias=bias, seed=chain.recipe.seed)
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


def _ends(model: nn.Module, example: Tensor) -> tuple[Reading, tuple[Tensor, list[Tensor], Tensor]]:
    copied = share(model).eval()
    try:
        r = last_layers("teacher", copied, example)
        batch = torch.rand(3, *example.shape[1:], generator=torch.Generator().manual_seed(4)).to(example)
        return r, reading(copied, r, batch)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"teacher.head: {error}") from None


def _layers(model: nn.Module, r: Reading) -> list[Any]:
    found = [model.get_submodule(name) for name in r.names]
    for layer in found:
        if not isinstance(layer, nn.Linear) and not (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)):
            raise RecipeError(
                f"teacher.head: a head can be put into linear layers and 1×1 convolutions, {type(model).__name__} ends "
                f"in {type(layer).__name__}"
            )
    return found


@torch.no_grad()
def put(
    model: nn.Module, r: Reading, example: Tensor, weight: Tensor, bias: Tensor | None, *, dry: bool = False
) -> None:
    """Makes `W z + b` the logits of a model whose last layers these are, whether one, or a sum of several.

    Raises:
        RecipeError: that is not what they make; a bias, and a layer without one. `dry`: only that.
    """
    layers = _layers(model, r)
    batch = torch.rand(3, *example.shape[1:], generator=torch.Generator().manual_seed(4)).to(example)
    z, outputs, logits = reading(model.eval(), r, batch)
    scale = r.scale_for(outputs, logits)
    same = torch.allclose((scale[:, None, None] * torch.stack(outputs)).sum(0), logits, rtol=1e-3, atol=1e-4)
    if not same or not bool((scale.abs() > 1e-6).all()):
        raise RecipeError(
            f"teacher.head: {type(model).__name__} computes more behind its last layers: no head fits there"
        )
    if bias is not None and any(layer.bias is None for layer in layers):
        raise RecipeError("teacher.head: a bias, and the network's last layer has none")
    if dry:
        return
    parts = weight.split([shape.numel() for shape in r.distinct_shapes], 1)
    for layer, i, factor in zip(layers, r.reads, scale):
        layer.weight.copy_((parts[i] / (factor * r.reads.count(i)).cpu()).reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(torch.zeros(len(weight)) if bias is None else bias / (factor * len(layers)).cpu())
    expected = z.cpu().float() @ weight.float().T + (0 if bias is None else bias)
    if not torch.allclose(reading(model, r, batch)[2].cpu().float(), expected, rtol=1e-2, atol=1e-3):
        raise NetworkError("teacher.head: the head that was put into the network does not give its logits")
