"""Fits of one last layer by afr, self, class_balanced and evals, and the choice among them by the worst group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from torch import Tensor
from torch.nn import functional as F

from debiaskd.bias import afr_weights, class_weights, disagreement, fit_last_layer, loss_extremes
from debiaskd.pipeline.dfr import Scale
from debiaskd.pipeline.dfr import fit as fit_l1
from debiaskd.recipe import RefitOptions
from debiaskd.training.feature_extraction import Reading

#: What is tried where a recipe leaves it open: AFR's γ; the pull towards the old layer; numbers of images (of EVaLS for
#: either side of a class); inverse strengths of EVaLS's L1 penalty.
GAMMAS, PULLS = (1.0, 2.0, 4.0, 8.0, 12.0, 20.0), (1e-3, 1e-2, 1e-1)
COUNTS = {"self": (20, 100, 500), "evals": (10, 30, 100)}
STRENGTHS = (1.0, 0.1, 0.01)
ITERATIONS = 200

Layer = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Material:
    """What a layer is fitted to, and what chooses among fits.

    Attributes:
        fitted: outputs for the images that it is fitted to. `target` of these, int64 [N].
        early: outputs of a briefly trained model for the same images; for self.
        tuned: outputs for the images that choose. `tuned_target`, `tuned_groups` of these.
    """

    fitted: Reading
    target: Tensor
    early: Reading | None
    tuned: Reading
    tuned_target: Tensor
    tuned_groups: Tensor


@dataclass(frozen=True)
class Fit:
    """A fitted layer, the settings that it was fitted with, and the worst group's accuracy on the tuning images."""

    layer: Layer
    settings: dict[str, float]
    worst: float


def best_fit(method: str, options: RefitOptions, layer: Layer, material: Material) -> Fit:
    """The fit with the best worst group on the tuning images; of equals the first that was tried."""
    best: Fit | None = None
    for settings, made in candidates(method, options, layer, material):
        logits = F.linear(
            material.tuned.pooled.double(), made[0].double(), None if made[1] is None else made[1].double()
        )
        right = (logits.argmax(1) == material.tuned_target).double()
        worst = min(float(right[material.tuned_groups == g].mean()) for g in material.tuned_groups.unique())
        if best is None or worst > best.worst:
            best = Fit(made, settings, worst)
    assert best is not None
    return best


def candidates(
    method: str, options: RefitOptions, layer: Layer, material: Material
) -> Iterator[tuple[dict[str, float], Layer]]:
    """Every fit that is tried, with its settings."""
    read, target = material.fitted, material.target
    pulls = PULLS if options.pull is None else (options.pull,)
    counts = COUNTS.get(method, ()) if options.count is None else (options.count,)

    def fit(rows: Tensor | slice, weight: Tensor, pull: float) -> Layer:
        return fit_last_layer(
            read.pooled[rows], target[rows], *layer, sample_weight=weight, pull=pull, iterations=ITERATIONS
        )

    if method == "afr":
        gammas = GAMMAS if options.gamma is None else (options.gamma,)
        for gamma, pull in product(gammas, pulls):
            yield {"gamma": gamma, "pull": pull}, fit(slice(None), afr_weights(read.logits, target, gamma), pull)
    elif method == "class_balanced":
        for pull in pulls:
            yield {"pull": pull}, fit(slice(None), class_weights(target), pull)
    elif method == "self":
        assert material.early is not None
        for count, pull in product(counts, pulls):
            rows = disagreement(material.early.logits, read.logits, target, count)
            yield {"count": count, "pull": pull}, fit(rows, class_weights(target[rows]), pull)
    else:
        loss = F.cross_entropy(read.logits, target, reduction="none")
        strengths = STRENGTHS if options.pull is None else (1 / options.pull,)
        for count, strength in product(counts, strengths):
            rows = loss_extremes(loss, target, count)
            yield {"count": count, "pull": 1 / strength}, _l1(read.pooled[rows], target[rows], strength, layer)


def _l1(feature: Tensor, target: Tensor, strength: float, layer: Layer) -> Layer:
    """The L1 fit of EVaLS, in the shape of the layer that it replaces."""
    weight, bias = layer
    scale = Scale.of(feature.double(), centred=bias is not None)
    made, offset, _ = fit_l1(scale(feature.double()), target, strength, intercept=bias is not None)
    made = made / scale.deviation
    return made.to(weight.dtype), None if bias is None else (offset - made @ scale.mean).to(bias.dtype)
