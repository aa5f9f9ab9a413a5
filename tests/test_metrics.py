"""Metrics and the closed-form map against numbers by hand, reference vectors and autograd."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from debiaskd import Boxes
from debiaskd.attribution import final_layer_map
from debiaskd.metrics import energy_in_box, group_accuracy

GOLDEN = Path(__file__).parent / "golden"


def reference(name):
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / name).items()}


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


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 0], [0, 0], [0]), TypeError, "correct must be bool"),
        (([True], [0, 1], [0]), ValueError, r"groups must have shape \[N\]=\[1\], got \[2\]"),
        (([True], [0.0], [0]), TypeError, "groups must be int64, got torch.float32"),
        (([True], [-1], [0]), ValueError, "groups must hold ids >= 0"),
        (([True], [1], [0]), ValueError, "training_groups must have a group in common"),
    ],
)
def test_bad_groups(arguments, error, message):
    with pytest.raises(error, match=message):
        group_accuracy(*map(torch.tensor, arguments))


def test_no_samples():
    with pytest.raises(ValueError, match="groups must hold ids >= 0, at least one, got none"):
        group_accuracy(torch.ones(0).bool(), torch.ones(0).long(), torch.tensor([0]))


def test_energy_reproduces_the_reference():
    given = reference("metrics.npz")
    attributions, boxes = given["attributions"], Boxes(given["boxes"], given["offsets"])
    got = energy_in_box(attributions, boxes)
    torch.testing.assert_close(got.double(), given["epg_each"].double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got.double().mean(), given["epg"].double(), rtol=1e-5, atol=1e-7)


def test_energy_of_upsampled_maps_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(5, 6, 6, generator=generator)
    maps[4] = -1.0
    rows = [[[3, 5, 20, 21]], [], [[0, 0, 48, 48]], [[0, 0, 9, 9], [5, 5, 30, 14]], [[1, 1, 2, 2]]]
    got = energy_in_box(maps, Boxes.from_lists(rows), size=(48, 48))
    for value, attribution, boxes in zip(got, maps.double(), rows):
        large = nn.functional.interpolate(attribution[None, None], size=(48, 48), mode="bilinear")[0, 0].clamp(min=0)
        inside = sum(
            float(large[y, x])
            for y in range(48)
            for x in range(48)
            if any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in boxes)
        )
        expected = inside / float(large.sum()) if large.sum() > 0 else 0.0
        assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("attribution", "boxes", "error", "message"),
    [
        (torch.zeros(2, 4), Boxes.from_lists([[], []]), ValueError, r"attribution must have shape \[N,H,W\]"),
        (torch.zeros(2, 4, 4), Boxes.from_lists([[]]), ValueError, "boxes must be of N=2 images, got 1"),
        (torch.zeros(1, 4, 4), [[0, 0, 1, 1]], TypeError, "boxes must be debiaskd.Boxes, got list"),
        (torch.zeros(1, 4, 4).long(), Boxes.from_lists([[]]), TypeError, "attribution must be float32"),
    ],
)
def test_bad_energy_arguments(attribution, boxes, error, message):
    with pytest.raises(error, match=message):
        energy_in_box(attribution, boxes)


def test_final_layer_map_reproduces_the_reference():
    given = reference("attribution.npz")
    cases = {key.split("_")[0] for key in given if key.endswith("cam_weight")}
    assert cases
    for case in cases:
        one = {key.removeprefix(f"{case}_"): value for key, value in given.items() if key.startswith(f"{case}_")}
        got = final_layer_map(one["feature"], one["cam_weight"], one["target"])
        torch.testing.assert_close(got, one["cam_ixg"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got.clamp(min=0), one["cam_gradcam"], rtol=1e-4, atol=1e-6)


def test_final_layer_map_is_input_times_gradient():
    torch.manual_seed(0)
    feature = torch.randn(4, 7, 5, 3, dtype=torch.float64, requires_grad=True)
    linear, target = nn.Linear(7, 3).double(), torch.tensor([2, 0, 1, 1])
    logits = linear(feature.mean((2, 3)))
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), feature)
    got = final_layer_map(feature.detach(), linear.weight.detach(), target)
    torch.testing.assert_close(got, (gradient * feature).sum(1).detach())
    own = logits.gather(1, target[:, None])[:, 0] - linear.bias[target]
    torch.testing.assert_close(got.sum((1, 2)), own.detach())


def test_final_layer_map_of_no_sample():
    assert final_layer_map(torch.ones(0, 2, 3, 3), torch.ones(4, 2), torch.ones(0).long()).shape == (0, 3, 3)


@pytest.mark.parametrize(
    ("feature", "weight", "target", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2).long(), ValueError, "feature must have shape"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 5), torch.zeros(2).long(), ValueError, "weight must have shape"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3), torch.zeros(3).long(), ValueError, r"target must have shape \[N\]"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3), torch.zeros(2), TypeError, "target must be int64"),
    ],
)
def test_bad_map_arguments(feature, weight, target, error, message):
    with pytest.raises(error, match=message):
        final_layer_map(feature, weight, target)
