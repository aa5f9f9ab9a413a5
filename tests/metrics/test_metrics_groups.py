"""Accuracies over groups against numbers by hand."""

import math

import pytest
import torch

from debiaskd.metrics import group_accuracy


def test_accuracies_by_hand():
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3, 3])
    correct = torch.tensor([1, 1, 1, 0, 1, 0, 0, 1, 1, 1]).bool()
    training = torch.tensor([0] * 6 + [1] * 1 + [2] * 1 + [3] * 2)
    accuracy = group_accuracy(correct, groups, training)
    assert accuracy.groups == (75.0, 50.0, 0.0, 100.0)
    assert accuracy.average == 70.0
    assert accuracy.worst_group == 0.0
    assert accuracy.unbiased == 56.25
    assert accuracy.adjusted == pytest.approx(0.6 * 75 + 0.1 * 50 + 0.1 * 0 + 0.2 * 100)


def test_groups_without_test_samples_count_nowhere():
    accuracy = group_accuracy(
        torch.tensor([True, False, True]), torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1, 1, 2, 2])
    )
    assert accuracy.groups[0] == 50 and math.isnan(accuracy.groups[1]) and accuracy.groups[2] == 100
    assert accuracy.worst_group == 50 and accuracy.unbiased == 75
    assert accuracy.adjusted == pytest.approx((1 * 50 + 2 * 100) / 3)


def test_adjusted_is_the_average_where_test_is_distributed_like_training():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(4, (500,), generator=generator)
    correct = torch.rand(500, generator=generator) < 0.7
    accuracy = group_accuracy(correct, groups, groups)
    assert accuracy.adjusted == pytest.approx(accuracy.average)


@pytest.mark.parametrize("training", [torch.tensor([0, 0, 3]), None])
def test_without_a_group_in_common_only_the_adjusted_accuracy_is_undefined(training):
    correct, groups = torch.tensor([True, False, True, True, True]), torch.tensor([1, 1, 2, 2, 2])
    accuracy = group_accuracy(correct, groups, training)
    assert math.isnan(accuracy.adjusted)
    assert (accuracy.average, accuracy.worst_group, accuracy.unbiased, accuracy.smallest) == (80, 50, 75, 2)
    assert math.isnan(accuracy.groups[0]) and accuracy.groups[1:3] == (50, 100)


def test_a_group_without_training_samples_has_no_share():
    accuracy = group_accuracy(torch.tensor([True, False, True]), torch.tensor([0, 1, 3]), torch.tensor([0, 0, 3, 3]))
    assert accuracy.adjusted == 100 and accuracy.worst_group == 0 and accuracy.smallest == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 0], [0, 0], [0]), TypeError, "correct must be bool"),
        (([True], [0, 1], [0]), ValueError, r"groups must have shape \[N\]=\[1\], got \[2\]"),
        (([True], [0.0], [0]), TypeError, "groups must be int64, got torch.float32"),
        (([True], [-1], [0]), ValueError, "groups must hold ids >= 0"),
    ],
)
def test_bad_groups(arguments, error, message):
    with pytest.raises(error, match=message):
        group_accuracy(*map(torch.tensor, arguments))


def test_no_samples():
    with pytest.raises(ValueError, match="groups must hold ids >= 0, at least one, got none"):
        group_accuracy(torch.ones(0).bool(), torch.ones(0).long(), torch.tensor([0]))
