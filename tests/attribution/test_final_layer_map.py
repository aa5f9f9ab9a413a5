"""The closed-form map against reference vectors and autograd."""

import pytest
import torch
from cases import reference
from torch import nn

from debiaskd.attribution import final_layer_map


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
