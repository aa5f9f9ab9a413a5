"""Refit a last layer as DFR does: L1-regularised logistic regression on equally many images of each group.

Kirichenko et al. 2023 (arXiv 2204.02937), as the authors' code does it (PolinaKirichenko/deep_feature_reweighting). The
strength of regularisation is the one whose fit to balanced images of one half has the highest worst-group accuracy on
the other half. The layer is then fitted to balanced draws from all of the images, and the draws' layers are averaged.
Features are standardised. The solver is liblinear, which regularises the intercept as well. Where the authors' code
halves at random, each group is halved here, so that both halves hold every class.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from debiaskd.training.split_parts import divided

#: Inverse strengths of the L1 penalty that are tried, and balanced draws whose fits are averaged.
STRENGTHS, DRAWS = (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01), 20
#: Images of a group that both halves can have one of.
LEAST = 2


class FitWarning(UserWarning):
    """Fits of the last layer stopped before they converged."""


@dataclass(frozen=True)
class Scale:
    """What features [N,D] are standardised by: `(feature - mean) / deviation`."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, feature: Tensor, *, centred: bool = True) -> Scale:
        """The moments of features [N,D]; with `centred` False, mean 0 and the root of the mean square."""
        count = feature.new_tensor(float(len(feature)))
        return cls.from_sums(count, feature.sum(0), feature.square().sum(0), centred=centred)

    @classmethod
    def from_sums(cls, count: Tensor, total: Tensor, squares: Tensor, *, centred: bool = True) -> Scale:
        """The same from the number of features, their sum [D], and the sum of their squares [D]."""
        mean = total / count if centred else torch.zeros_like(total)
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        # A feature that never changes is left as it is; rounding may leave a trace of a deviation.
        flat = deviation <= 1e-7 * (squares / count).sqrt()
        return cls(mean, torch.where(flat, torch.ones_like(deviation), deviation))

    def __call__(self, feature: Tensor) -> Tensor:
        return (feature - self.mean) / self.deviation


@dataclass(frozen=True)
class Refit:
    """A fitted last layer, which reads features as they are.

    Attributes:
        weight, bias: float64 [K,D] and [K]; the bias is 0 without an intercept.
        strength: the inverse strength that was chosen.
        tuned: worst-group accuracy on the other half by inverse strength.
        draw: images of each balanced draw.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    tuned: Mapping[float, float]
    draw: int


def too_small(
    target: Tensor,
    groups: Tensor,
    classes: int,
    least: int = LEAST,
    names: tuple[Sequence[str], Sequence[str]] | None = None,
) -> str | None:
    """The reason why a last layer cannot be fitted to these images; None if it can.

    Args:
        target, groups: int64 [N].
        classes: K.
        least: images that every group must have.
        names: of the classes and of the groups.
    """
    if classes < 2:
        return "needs two classes at least"
    missing = sorted(set(range(classes)) - set(target.unique().tolist()))
    if missing:
        name = f"class {missing[0]}" if names is None else names[0][missing[0]]
        return f"needs images of every class, and there are none of {name}"
    counts = groups.bincount()
    for group in groups.unique().tolist():
        if counts[group] < least:
            name = f"group {group}" if names is None else names[1][group]
            return f"needs {least} images of every group at least, and {name} has {int(counts[group])}"
    return None


def refit(
    feature: Tensor, target: Tensor, groups: Tensor, scale: Scale, *, intercept: bool = True, seed: int = 0
) -> Refit:
    """Fit a last layer for K classes to what it reads.

    Args:
        feature: float64 [N,D].
        target: int64 [N], 0…K-1, all of which occur.
        groups: int64 [N]; every group has two images at least.
        scale: what the final fits standardise features by: those of the training images.
        intercept: fit a bias; without one, features are scaled and not centred.
        seed: decides the halves and the draws.

    Returns:
        The layer. Two classes: the logits' difference is liblinear's decision function. More: one class against the
        rest, each logit that class's decision function.

    Raises:
        ValueError: too few images of a class or a group.

    Warns:
        FitWarning: fits ended before they converged.
    """
    problem = too_small(target, groups, int(target.max()) + 1 if len(target) else 0)
    if problem is not None:
        raise ValueError(f"a last layer {problem}")
    generator = torch.Generator().manual_seed(seed)
    first, other = halves(groups, generator)
    rows = first[balanced(groups[first], generator)]
    tuning = Scale.of(feature[rows], centred=intercept)
    tuned, unfinished = {}, 0
    for strength in STRENGTHS:
        weight, bias, ended = fit(tuning(feature[rows]), target[rows], strength, intercept=intercept)
        tuned[strength] = worst(weight, bias, tuning(feature[other]), target[other], groups[other])
        unfinished += ended
    strength = max(STRENGTHS, key=lambda c: tuned[c])  # the first of equals
    weights, biases = [], []
    for number in range(DRAWS):
        rows = balanced(groups, generator)
        weight, bias, ended = fit(scale(feature[rows]), target[rows], strength, intercept=intercept, seed=number)
        weights.append(weight)
        biases.append(bias)
        unfinished += ended
    if unfinished:
        warnings.warn(
            f"{unfinished} of {len(STRENGTHS) + DRAWS} fits of the last layer ended before they converged",
            FitWarning,
            stacklevel=2,
        )
    weight, bias = torch.stack(weights).mean(0) / scale.deviation, torch.stack(biases).mean(0)
    return Refit(weight, bias - weight @ scale.mean, strength, tuned, len(rows))


def halves(groups: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers of two halves of each group, at random; the first has the larger of uneven ones."""
    return divided(groups, 0.5, generator)


def balanced(groups: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of as many images of each group as the smallest has, at random."""
    least = int(groups.bincount()[groups.unique()].min())
    drawn = []
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        drawn.append(members[torch.randperm(len(members), generator=generator)[:least]])
    return torch.cat(drawn)


def fit(
    feature: Tensor, target: Tensor, strength: float, *, intercept: bool = True, seed: int = 0
) -> tuple[Tensor, Tensor, bool]:
    """(weight [K,D], bias [K], whether it ended before it converged) of liblinear's L1 fit to features [N,D]."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classes = int(target.max()) + 1
    problems = [target == 1] if classes == 2 else [target == k for k in range(classes)]
    weights, biases, ended = [], [], False
    for positive in problems:
        solver = LogisticRegression(
            C=strength, solver="liblinear", fit_intercept=intercept, max_iter=1000, random_state=seed, **_penalty()
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            solver.fit(feature.numpy(), positive.numpy())
        for warning in caught:
            if issubclass(warning.category, ConvergenceWarning):
                ended = True
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        weights.append(torch.from_numpy(solver.coef_[0]))
        biases.append(torch.as_tensor(solver.intercept_, dtype=torch.float64).reshape(-1)[0])
    weight, bias = torch.stack(weights), torch.stack(biases)
    if classes == 2:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight, bias, ended


def _penalty() -> dict[str, Any]:
    """L1, as the scikit-learn that is installed has it: `penalty` is deprecated from 1.8 on, and leaves in 1.10."""
    from sklearn.linear_model import LogisticRegression

    old = inspect.signature(LogisticRegression).parameters.get("penalty")
    return {"l1_ratio": 1.0} if old is None or old.default == "deprecated" else {"penalty": "l1"}


def worst(weight: Tensor, bias: Tensor, feature: Tensor, target: Tensor, groups: Tensor) -> float:
    """Worst-group accuracy of a layer."""
    right = (feature @ weight.T + bias).argmax(1) == target
    return min(float(right[groups == group].double().mean()) for group in groups.unique())
