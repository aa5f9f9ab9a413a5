"""Groups within each class, found from a plainly trained model's features and early losses.

After GEORGE (Sohoni et al. 2020, "No Subclass Left Behind", arXiv 2011.12945): what a plainly trained model cannot
tell from its shortcut lies in clusters of its own in feature space. Per class: features are projected on their main
directions; the loss after the first epochs joins as one more direction, because a shortcut is learnt first, so that
samples which contradict it still cost then; a mixture of Gaussians of one common covariance splits them, with the
number of components of the best silhouette among those that describe the class better than one Gaussian does (ICL).
k-means would not do: it makes clusters of like size, and the groups that matter are small. A cluster too small to
measure an accuracy on is merged into the nearest one.

Where the final model's logits are at hand, its environments (`infer_environments`) are the other way to groups: they
part what the model gets wrong from what it gets right, and know nothing of what the images have in common.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from debiaskd.bias.environments import check_labels
from debiaskd.bias.groups import FoundGroups
from debiaskd.utils import checks

#: Samples of a class that the silhouette is computed on: it costs the square of their number.
SILHOUETTE_SAMPLES = 2000
#: Added to variances, in units of the points' total variance.
RIDGE = 1e-4


def find_groups(
    feature: Tensor,
    labels: Tensor,
    early_loss: Tensor | None = None,
    *,
    most: int = 4,
    smallest: int = 20,
    dimensions: int = 8,
    loss_share: float = 0.3,
    seed: int = 0,
) -> FoundGroups:
    """Clusters of samples within each class.

    Args:
        feature: [N,D] pooled features of a plainly trained model, in any floating dtype.
        labels: int64 [N] ≥ 0.
        early_loss: [N], each sample's loss after the first epochs of that training; None: features alone.
        most: clusters in a class at most.
        smallest: samples in a cluster at least; a class of fewer than twice as many is one cluster.
        dimensions: directions that features are projected on.
        loss_share: of the variance, how much the early loss makes up, in [0,1).
        seed: of the mixture's initial components.

    Returns:
        `FoundGroups`; the same for the same input and seed.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        ModuleNotFoundError: scikit-learn is not installed (`pip install 'debiaskd[train]'`).

    Example:
        >>> import torch
        >>> from debiaskd.bias import find_groups
        >>> feature = torch.cat([torch.randn(60, 3) + 8, torch.randn(30, 3)])
        >>> find_groups(feature, torch.zeros(90, dtype=torch.int64)).sizes()
        {(0, 0): 60, (0, 1): 30}

    Source: Sohoni et al. 2020; Jiang et al. 2021 for early losses.
    """
    checks.rank("feature", checks.floating("feature", feature), "[N,D]")
    check_labels(labels, len(feature), int(labels.max()) + 1 if len(labels) else 1)
    for name, value, least in (("most", most, 1), ("smallest", smallest, 1), ("dimensions", dimensions, 1)):
        if checks.integer(name, value) < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    if not 0 <= checks.number("loss_share", loss_share) < 1:
        raise ValueError(f"loss_share must lie in [0, 1), got {loss_share}")
    if early_loss is not None:
        checks.shape("early_loss", checks.floating("early_loss", early_loss), "[N]", [len(feature)])
    rows = feature.detach().double().cpu().numpy()
    losses = None if early_loss is None else early_loss.detach().double().cpu().numpy()
    for name, values in (("feature", rows), ("early_loss", losses)):
        if values is not None and not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    clusters = torch.zeros(len(feature), dtype=torch.int64)
    confidence = torch.ones(len(feature), dtype=torch.float64)
    for label in labels.unique().tolist():
        of_class = (labels == label).nonzero()[:, 0].cpu()
        chosen = of_class.numpy()
        points = _points(rows[chosen], None if losses is None else losses[chosen], dimensions, loss_share)
        found = _clusters(points, most, smallest, seed)
        clusters[of_class] = torch.from_numpy(found)
        confidence[of_class] = torch.from_numpy(_confidence(points, found))
    return FoundGroups(labels.cpu(), clusters, confidence)


def _points(feature: NDArray[Any], loss: NDArray[Any] | None, dimensions: int, loss_share: float) -> NDArray[Any]:
    """[n,d] of total variance 1: main directions of the features, and the early loss."""
    centred = feature - feature.mean(0)
    kept = min(dimensions, *centred.shape)
    left, scale, _ = np.linalg.svd(centred, full_matrices=False)
    points: NDArray[Any] = left[:, :kept] * scale[:kept]
    total = np.sqrt(np.square(points).sum() / len(points))
    points = points / total if total > 1e-12 else np.zeros_like(points)
    if loss is None or loss_share == 0:
        return points
    column = np.log(loss.clip(min=1e-6))  # of losses that reach over orders of magnitude
    column = column - column.mean()
    deviation = column.std()
    column = column / deviation if deviation > 1e-12 else np.zeros_like(column)
    return np.concatenate([np.sqrt(1 - loss_share) * points, np.sqrt(loss_share) * column[:, None]], 1)


def _clusters(points: NDArray[Any], most: int, smallest: int, seed: int) -> NDArray[Any]:
    """int64 [n], the largest cluster first."""
    from sklearn.metrics import silhouette_score
    from sklearn.mixture import GaussianMixture

    best, score = np.zeros(len(points), dtype=np.int64), -1.0
    distinct = len(np.unique(points, axis=0))
    if len(points) >= 2 * smallest and distinct > 1:
        options = {"covariance_type": "tied", "n_init": 3, "reg_covar": RIDGE, "random_state": seed}
        whole = _description_length(points, best)
        for count in range(2, min(most, distinct - 1) + 1):
            found = _merged(points, GaussianMixture(count, **options).fit_predict(points), smallest)
            if found.max() == 0 or _description_length(points, found) >= whole:
                continue
            # sample_size draws at random and may miss a small cluster: a fixed stride over what is sorted by cluster.
            chosen = np.argsort(found, kind="stable")[:: -(-len(points) // SILHOUETTE_SAMPLES)]
            if len(np.unique(found[chosen])) < 2:
                continue
            value = silhouette_score(points[chosen], found[chosen])
            if value > score:
                best, score = found, value
    order = np.argsort(-np.bincount(best), kind="stable")
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order))
    return ranks[best]


def _description_length(points: NDArray[Any], found: NDArray[Any]) -> float:
    """Minus twice the log-likelihood of points and clusters together, and a penalty for parameters (ICL).

    Of Gaussians of one covariance. A single Gaussian cut in two has a longer description than the whole.
    """
    counts = np.bincount(found)
    residual = points - _centres(points, found)[found]
    covariance = residual.T @ residual / len(points) + RIDGE * np.eye(points.shape[1])
    likelihood = (counts * np.log(counts / len(points))).sum() - len(points) * np.linalg.slogdet(covariance)[1] / 2
    return float(-2 * likelihood + (points.shape[1] + 1) * len(counts) * np.log(len(points)))


def _merged(points: NDArray[Any], found: NDArray[Any], smallest: int) -> NDArray[Any]:
    """Merge clusters too small to be measured into the one with the nearest centre, the smallest first."""
    while True:
        found = np.unique(found, return_inverse=True)[1].astype(np.int64)
        counts = np.bincount(found)
        least = int(counts.argmin())
        if len(counts) == 1 or counts[least] >= smallest:
            return found
        centres = _centres(points, found)
        distance = np.linalg.norm(centres - centres[least], axis=1)
        distance[least] = np.inf
        found = np.where(found == least, int(distance.argmin()), found)


def _centres(points: NDArray[Any], found: NDArray[Any]) -> NDArray[Any]:
    return np.stack([points[found == cluster].mean(0) for cluster in range(int(found.max()) + 1)])


def _confidence(points: NDArray[Any], found: NDArray[Any]) -> NDArray[Any]:
    if found.max() == 0:
        return np.ones(len(points))
    distance = np.linalg.norm(points[:, None] - _centres(points, found), axis=2)
    own = distance[np.arange(len(points)), found]
    distance[np.arange(len(points)), found] = np.inf
    nearest = distance.min(1)
    confidence: NDArray[Any] = (1 - own / np.where(nearest > 0, nearest, 1)).clip(0, 1)
    return confidence
