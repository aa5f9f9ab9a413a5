"""Sample weights for DeTT and related methods: upweight the mistakes of an ERM model, or balance groups.

Without group annotation: train an identification model (the student's architecture, plain cross-entropy, briefly),
then, with its weights fixed, predict over the whole training set; its mistakes are the error set.
Liu et al. 2021, "Just Train Twice" (arXiv 2107.09044); Lee & Lee 2023, DeTT (arXiv 2302.11187).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from debiaskd.utils import checks


class ErrorSetWarning(UserWarning):
    """The error set is empty or contains most of the data, so that weights have no useful effect."""


def error_weights(correct: Tensor, up: float = 50.0, *, convention: str = "weight") -> Tensor:
    """Return weight `up` for the mistakes of an identification model, and 1 for all other samples.

    Reads the values, so that it synchronises with a GPU; call it once, before training.

    Args:
        correct: [N] bool, whether the identification model predicted sample i correctly.
        up: λ > 0. JTT's settings: Waterbirds 100, CelebA 50, MultiNLI 4, CivilComments 6.
        convention: "weight": mistakes have weight `up`. "copies": JTT's scripts, which append `up` copies (a whole
            number) of each mistake to the data; each then counts `up + 1` times.

    Returns:
        [N] float32 on the device of `correct`, not normalised.

    Warns:
        ErrorSetWarning: no mistake at all, or mistakes on more than half of the samples.

    Raises:
        TypeError: `correct` is not a bool tensor, `up` not a number.
        ValueError: `correct` is not [N] with N ≥ 1, `up` out of range, an unknown convention.

    Example:
        >>> import torch
        >>> from debiaskd.reweight import error_weights
        >>> error_weights(torch.tensor([True, False, True, True]), up=20.0)
        tensor([ 1., 20.,  1.,  1.])
    """
    correct = checks.tensor("correct", correct)
    if correct.dtype != torch.bool:
        raise TypeError(f"correct must be bool (prediction == label), got {correct.dtype}")
    _samples("correct", correct)
    up = checks.number("up", up, minimum=0.0, exclusive=True)
    checks.option("convention", convention, ("weight", "copies"))
    if convention == "copies":
        if up != int(up):
            raise ValueError(f"up must be a whole number of copies for convention='copies', got {up!r}")
        up += 1.0
    _report(int((~correct).sum()), correct.numel())
    return torch.where(correct, 1.0, up).to(torch.float32)


def _report(mistakes: int, samples: int) -> None:
    if mistakes == 0:
        warnings.warn(
            f"the error set is empty: the identification model predicts all {samples} samples rightly, so every "
            "weight is 1 and nothing is debiased; train it for fewer epochs, with stronger weight decay or a lower "
            "learning rate, so that it cannot memorise the samples that contradict the bias",
            ErrorSetWarning,
            stacklevel=3,
        )
    elif 2 * mistakes > samples:
        warnings.warn(
            f"the error set is {mistakes} of {samples} samples ({100 * mistakes / samples:.1f} %): more than half of "
            "the data is upweighted, so the mistakes no longer point at what contradicts the bias; train the "
            "identification model for longer, and check that predictions and labels are in the same order",
            ErrorSetWarning,
            stacklevel=3,
        )


def group_weights(groups: Tensor) -> Tensor:
    """Return weights that balance the groups, `w_i = N / (G · n_group(i))`; their mean is 1.

    G is the number of groups that occur. An id that no sample has is not a group, so ids may have gaps.

    Args:
        groups: [N] int64, each sample's group ≥ 0.

    Returns:
        [N] float32 on the device of `groups`.

    Raises:
        TypeError: `groups` is not an int64 tensor.
        ValueError: `groups` is not [N] with N ≥ 1, or an id is negative (often a mark for "unknown": leave such
            samples out).

    Example:
        >>> import torch
        >>> from debiaskd.reweight import group_weights
        >>> group_weights(torch.tensor([0, 0, 0, 7]))
        tensor([0.6667, 0.6667, 0.6667, 2.0000])
    """
    groups = checks.tensor("groups", groups)
    if groups.dtype != torch.int64:
        raise TypeError(f"groups must be int64, got {groups.dtype}")
    _samples("groups", groups)
    lowest = int(groups.min())
    if lowest < 0:
        raise ValueError(f"groups must be >= 0, got {lowest}: leave out samples whose group is unknown")
    unique: tuple[Tensor, Tensor, Tensor] = torch.unique(groups, return_inverse=True, return_counts=True)
    _, index, counts = unique
    weights = groups.numel() / (counts.numel() * counts.to(torch.float64))
    return weights.to(torch.float32)[index]


def _samples(name: str, value: Tensor) -> None:
    checks.rank(name, value, "[N]")
    if value.numel() == 0:
        raise ValueError(f"{name} must have at least one sample, got shape [0]")


def predict_correct(
    model: nn.Module,
    batches: Iterable[Any],
    device: torch.device | str | None = None,
    *,
    indices: int | None = None,
) -> Tensor:
    """Return whether the trained `model` predicts each sample correctly, for `error_weights`.

    Call it after the identification model's training, over the training set in its own order and without random
    augmentation: predictions recorded while a model trains come from a different model each step. The model runs in
    eval mode without gradients; every submodule's mode is restored, also after an error.

    Args:
        model: images to logits [n,K], K ≥ 2.
        batches: sequences that start with (images, labels), labels [n] int64. Without `indices`, weights are matched
            to samples by position: a loader must then read all of its data set in order. A `DataLoader`, torchdata's
            `StatefulDataLoader` included, is refused if it may not: with any sampler or batch sampler but torch's
            sequential ones and a `DistributedSampler` of one rank without shuffling, with `drop_last`, with workers and
            `in_order=False`, and over an `IterableDataset`. The order of other iterables is not checked.
        device: where batches are sent; None: the device of the model's first parameter. The model is not moved.
        indices: position within each batch of the sample indices, int64 [n], such as 2 for (images, labels, numbers).
            Predictions are then stored at these positions, and any loader works that yields every sample once.

    Returns:
        [N] bool on the CPU, in the order of the data set.

    Raises:
        TypeError: not a module, a batch that is not such a sequence, labels or indices that are not int64.
        ValueError: a loader that may not keep the order or does not give every sample, no batch, logits that are not
            [n,K] for the labels or are NaN, a label outside [0,K), indices that are not each of 0..N - 1 once.

    Example:
        >>> import torch
        >>> from debiaskd.reweight import error_weights, predict_correct
        >>> images, labels = torch.eye(3), torch.tensor([0, 1, 1])
        >>> correct = predict_correct(torch.nn.Identity(), [(images[:2], labels[:2]), (images[2:], labels[2:])])
        >>> error_weights(correct)
        tensor([ 1.,  1., 50.])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if indices is None:
        _in_order(batches)
    elif checks.integer("indices", indices) < 2:
        raise ValueError(f"indices must be >= 2, after images and labels, got {indices}")
    if device is None:
        tensor = next(chain(model.parameters(), model.buffers()), None)
        device = torch.device("cpu") if tensor is None else tensor.device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            numbers: list[Tensor] = []
            found = []
            for batch in batches:
                found.append(_correct(model, batch, device))
                if indices is not None:
                    numbers.append(_numbers(batch, indices))
    finally:
        for module, training in modes:
            module.training = training
    if not found:
        raise ValueError("batches must give at least one batch, got none (an iterator is used up after one pass)")
    correct = torch.cat(found).cpu()
    if indices is None:
        _whole(batches, len(correct))
    return correct if indices is None else _placed(correct, torch.cat(numbers))


#: Alternatives, for error messages.
_INSTEAD = "leave out sampler and shuffle, or let batches hold the samples' numbers and say where (indices)"


def _in_order(batches: object) -> None:
    """Refuse a DataLoader, or a wrapper of one, that may not read all of its data set in order."""
    dataset, sampler = getattr(batches, "dataset", None), getattr(batches, "sampler", None)
    batched = getattr(batches, "batch_sampler", None)
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "batches must keep the order of the data set, got a DataLoader of an IterableDataset, which has none; let "
            "batches hold the samples' numbers and say where (indices)"
        )
    if sampler is None and batched is None and not isinstance(batches, DataLoader):
        return
    name = type(batches).__name__
    if getattr(batches, "drop_last", False) or getattr(batched, "drop_last", False):
        raise ValueError(f"batches must cover every sample, got a {name} with drop_last=True")
    if getattr(batches, "num_workers", 0) and not getattr(batches, "in_order", True):
        raise ValueError(f"batches must keep the order of the data set, got a {name} with in_order=False")
    if batched is not None and not _is_plain(batched, "BatchSampler", BatchSampler):
        blamed = batched
    else:
        blamed = sampler if batched is None else getattr(batched, "sampler", None)
        if _sequential(blamed, dataset):
            return
    what = type(blamed).__name__ + (", shuffle=True" if type(blamed).__name__ == "RandomSampler" else "")
    raise ValueError(f"batches must keep the order of the data set, got a {name} with a {what}: {_INSTEAD}")


def _whole(batches: object, count: int) -> None:
    """A resumed loader reads in order, but not from the beginning."""
    dataset: Any = getattr(batches, "dataset", None)
    if getattr(batches, "sampler", None) is not None and hasattr(dataset, "__len__") and len(dataset) != count:
        raise ValueError(
            f"batches must cover every sample, got {count} of the data set's {len(dataset)}: a loader that was loaded "
            "with a state goes on where it was saved, and a collate_fn may leave samples out"
        )


def _is_plain(value: object, name: str, kind: type) -> bool:
    """Whether it is exactly torch's class, or torchdata's of the same name; a subclass may do anything."""
    same = type(value).__name__ == name and type(value).__module__ == "torchdata.stateful_dataloader.sampler"
    return type(value) is kind or same


def _sequential(sampler: object, dataset: object) -> bool:
    if type(sampler) is SequentialSampler:
        return sampler.data_source is dataset or len(sampler.data_source) == len(dataset)  # type: ignore[arg-type]
    if isinstance(sampler, DistributedSampler):
        from debiaskd.data.loading import EpochSampler

        known = type(sampler) is DistributedSampler or (type(sampler) is EpochSampler and not sampler.start)
        return known and sampler.num_replicas == 1 and not sampler.shuffle
    return False


def _numbers(batch: Any, place: int) -> Tensor:
    if len(batch) <= place:
        raise TypeError(f"batches must hold the samples' numbers at {place} (indices), got {len(batch)} parts")
    numbers = checks.tensor(f"batch[{place}]", batch[place])
    if numbers.dtype != torch.int64:
        raise TypeError(f"batch[{place}] must be int64, the samples' numbers (indices), got {numbers.dtype}")
    checks.shape(f"batch[{place}]", numbers, "[n]", [len(batch[1])])
    return numbers.cpu()


def _placed(correct: Tensor, numbers: Tensor) -> Tensor:
    if not torch.equal(numbers.sort().values, torch.arange(len(numbers))):
        raise ValueError(
            f"batches must give each sample's number once, 0 to {len(numbers) - 1}, "
            f"got {len(numbers.unique())} different ones in [{int(numbers.min())}, {int(numbers.max())}]"
        )
    placed = torch.empty_like(correct)
    placed[numbers] = correct
    return placed


def _correct(model: nn.Module, batch: Any, device: torch.device | str) -> Tensor:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(f"batches must give sequences (images, labels, ...), got {type(batch).__name__}")
    labels = checks.tensor("labels", batch[1]).to(device)
    logits = checks.tensor("the model's output", model(batch[0].to(device)))
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    checks.rank("labels", labels, "[n]")
    if logits.dim() != 2 or logits.shape[0] != labels.shape[0] or logits.shape[1] < 2:
        raise ValueError(f"model must give logits [n,K] = [{labels.shape[0]}, K >= 2], got {list(logits.shape)}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"labels must lie in [0, {logits.shape[1]}), the model's classes, "
            f"got values in [{int(labels.min())}, {int(labels.max())}]"
        )
    if bool(torch.isnan(logits).any()):
        raise ValueError("model must give logits that are numbers, got NaN: its training has diverged")
    return torch.eq(logits.argmax(dim=1), labels)
