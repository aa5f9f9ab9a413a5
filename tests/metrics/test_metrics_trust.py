"""Intervals, paired differences, calibration and faithfulness: against resampling written out, and known answers."""

import math

import numpy as np
import pytest
import torch

from debiaskd.metrics import (
    calibration_error,
    deletion,
    group_calibration_error,
    paired_difference,
    worst_group_interval,
)

# ---- intervals ----


def outcomes(*shares: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(correct, groups) of groups given as (right, images)."""
    correct = [torch.arange(images) < right for right, images in shares]
    groups = [torch.full((images,), 2 * group) for group, (_, images) in enumerate(shares)]  # ids with gaps
    order = torch.randperm(sum(images for _, images in shares), generator=torch.Generator().manual_seed(0))
    return torch.cat(correct)[order], torch.cat(groups)[order]


def test_interval_is_that_of_resampled_images() -> None:
    correct, groups = outcomes((40, 50), (14, 20), (90, 130))
    found = worst_group_interval(correct, groups)
    random, drawn = np.random.default_rng(5), []
    for _ in range(4000):
        accuracies = []
        for group in groups.unique():
            of_group = correct[groups == group].numpy()
            accuracies.append(of_group[random.integers(len(of_group), size=len(of_group))].mean())
        drawn.append(min(accuracies))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found.value == pytest.approx(90 / 130) and found.smallest == 20
    assert found.low == pytest.approx(low, abs=0.03) and found.high == pytest.approx(high, abs=0.03)
    assert found.low < found.value < found.high


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = torch.Generator().manual_seed(0)
    groups = torch.arange(3).repeat_interleave(100)
    covered = 0
    for _ in range(200):  # one group is clearly the worst, so that its accuracy is the truth
        correct = torch.rand(300, generator=random) < torch.tensor([0.9, 0.9, 0.6]).repeat_interleave(100)
        found = worst_group_interval(correct, groups, resamples=500)
        covered += found.low <= 0.6 <= found.high
    assert 180 <= covered <= 199


def test_a_larger_group_narrows_the_interval_and_more_confidence_widens_it() -> None:
    def width(images: int, level: float = 0.95) -> float:
        found = worst_group_interval(*outcomes((images // 2, images), (99, 100)), level=level)
        return found.high - found.low

    assert width(1000) < 0.5 * width(100)
    assert width(100, 0.5) < width(100) < width(100, 0.99)


def test_interval_of_certain_answers() -> None:
    found = worst_group_interval(*outcomes((5, 5), (3, 3)))
    assert (found.value, found.low, found.high, found.smallest) == (1.0, 1.0, 1.0, 3)


def test_paired_difference_is_surer_than_two_intervals() -> None:
    correct, groups = outcomes((60, 100), (90, 100))
    better = correct.clone()
    wrong = ((groups == 0) & ~correct).nonzero()[:6, 0]
    better[wrong] = True
    found = paired_difference(better, correct, groups)
    assert found.value == pytest.approx(0.06) and found.low > 0
    alone = worst_group_interval(correct, groups)
    assert alone.high > worst_group_interval(better, groups).low  # unpaired, the intervals overlap
    opposite = paired_difference(correct, better, groups)
    assert (opposite.value, opposite.low, opposite.high) == pytest.approx(
        (-found.value, -found.high, -found.low), abs=0.02
    )


def test_same_answers_differ_by_nothing() -> None:
    correct, groups = outcomes((6, 10), (9, 10))
    found = paired_difference(correct, correct, groups)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_worst_groups_of_two_methods_may_be_different_groups() -> None:
    first, groups = outcomes((50, 100), (90, 100))
    second, _ = outcomes((90, 100), (30, 100))
    assert paired_difference(first, second, groups).value == pytest.approx(0.2)


# ---- calibration ----


def test_calibration_of_known_bins() -> None:
    confidence = torch.tensor([0.9] * 10 + [0.6] * 10)
    correct = torch.tensor([True] * 7 + [False] * 3 + [True] * 8 + [False] * 2)
    assert calibration_error(confidence, correct, bins=2) == pytest.approx((0.2 + 0.2) / 2)
    assert calibration_error(confidence, correct, bins=1) == pytest.approx(abs(0.75 - 0.75))
    assert math.isnan(calibration_error(torch.empty(0), torch.empty(0, dtype=torch.bool)))


def test_calibration_does_not_depend_on_the_order_of_images() -> None:
    random = torch.Generator().manual_seed(0)
    confidence = (torch.rand(500, generator=random) * 20).round() / 20  # with many equal ones
    correct = torch.rand(500, generator=random) < confidence
    order = torch.randperm(500, generator=random)
    assert calibration_error(confidence, correct) == pytest.approx(calibration_error(confidence[order], correct[order]))
    assert calibration_error(confidence, correct) < 0.08 < calibration_error(1 - confidence, correct)


def test_calibration_by_group() -> None:
    confidence, correct = torch.full((8,), 0.5), torch.tensor([True, False] * 2 + [True] * 4)
    assert group_calibration_error(confidence, correct, torch.tensor([0] * 4 + [3] * 4)) == {0: 0.0, 3: 0.5}


# ---- faithfulness ----


def test_deletion_curve_of_a_model_that_counts_pixels() -> None:
    # Probability of class 0 falls linearly in the pixels that are left: the area is known.
    def model(images: torch.Tensor) -> torch.Tensor:
        share = images[:, 0].flatten(1).mean(1).clamp(1e-6, 1 - 1e-6)
        return torch.stack([share.log(), (1 - share).log()], 1)

    images = torch.ones(2, 1, 8, 8)
    found = deletion(model, images, torch.rand(2, 8, 8), torch.tensor([0, 0]), steps=64)
    torch.testing.assert_close(found.by_map, torch.full((2,), 0.5), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.at_random, found.by_map, rtol=0, atol=1e-3)


def test_a_faithful_map_of_lower_resolution_is_below_chance_and_its_opposite_above() -> None:
    def model(images: torch.Tensor) -> torch.Tensor:
        seen = images[:, :, :8, :8].mean((1, 2, 3))
        return torch.stack([10 * seen, 5 * torch.ones_like(seen)], 1)

    images = torch.ones(3, 2, 32, 32)
    maps = torch.zeros(3, 4, 4)
    maps[:, 0, 0] = 1
    target = torch.zeros(3, dtype=torch.int64)
    faithful, opposite = (deletion(model, images, sign * maps, target) for sign in (1, -1))
    assert bool((faithful.by_map < faithful.at_random - 0.2).all())
    assert bool((opposite.by_map > opposite.at_random + 0.2).all())
    coloured = deletion(model, images, maps, target, blank=torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(coloured.by_map, coloured.at_random)  # blanked to what was there


# ---- bad input ----

RIGHT, GROUPS = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: worst_group_interval(RIGHT, GROUPS[:2]), r"groups must have shape \[N\]=\[3\], got \[2\]"),
        (lambda: worst_group_interval(RIGHT.float(), GROUPS), "correct must be bool"),
        (lambda: worst_group_interval(RIGHT, GROUPS, level=1.0), r"level must lie in \(0, 1\), got 1.0"),
        (lambda: worst_group_interval(RIGHT, GROUPS, resamples=0), "resamples must be >= 1, got 0"),
        (lambda: paired_difference(RIGHT, RIGHT[:2], GROUPS), r"second must have shape \[N\]=\[3\], got \[2\]"),
        (lambda: calibration_error(torch.tensor([1.5]), RIGHT[:1]), r"confidence must lie in \[0, 1\]"),
        (lambda: calibration_error(torch.zeros(3), RIGHT, bins=0), "bins must be >= 1, got 0"),
        (
            lambda: deletion(lambda x: x, torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2), torch.tensor([0])),
            r"model must give logits \[N,K\] of N=1 images, got \[1, 1, 2, 2\]",
        ),
        (
            lambda: deletion(lambda x: x, torch.zeros(1, 1, 2, 2), torch.zeros(2, 2, 2), torch.tensor([0])),
            r"maps must have shape \[N,h,w\]=\[1, 2, 2\], got \[2, 2, 2\]",
        ),
    ],
)
def test_bad_input_is_named(call, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
