"""The ops under torch.func's transforms and in forward mode, whose tensors no kernel of ours can read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import debiaskd as dk
from debiaskd import Boxes
from debiaskd.ops.backend import BackendError

Function = Callable[[Tensor], Tensor]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def functions() -> dict[str, tuple[Function, Tensor]]:
    """A scalar function of one argument of each op, and where to take it."""
    teacher, feature, boxes = rand(4, 6, seed=1), rand(4, 6, 2, 2, seed=2), Boxes.from_lists([[[0, 0, 2, 3]]] * 4)
    labels, weight, logits = torch.tensor([0, 0, 1, 1]), rand(4, seed=3), rand(4, 3, seed=4)
    maps = rand(4, 5, 5, seed=10)
    context, head, bias = rand(3, 5, seed=5), rand(3, 11, seed=6), rand(3, seed=7)
    return {
        "feature_match": (lambda x: dk.feature_match_loss(x, teacher, weight), rand(4, 6)),
        "energy": (lambda x: dk.energy_loss(x, boxes), rand(4, 5, 5)),
        "ppce": (lambda x: dk.localization_loss(x, boxes, kind="ppce", size=(6, 6)), rand(4, 3, 3)),
        "cosine": (lambda x: dk.map_cosine_loss(x, maps, weight), rand(4, 3, 3)),
        "dot_vector": (lambda x: dk.channel_dot(x, feature).square().sum(), rand(4, 6)),
        "dot_map": (lambda x: dk.channel_dot(feature, x).square().sum(), rand(4, 6, 2, 2)),
        "relation": (lambda x: dk.class_relation_loss(x, teacher, labels), rand(4, 6)),
        "nwgm": (lambda x: dk.backdoor_logits(x, logits, context, head, bias).square().sum(), rand(4, 6)),
        "exact": (
            lambda x: dk.backdoor_logits(teacher, logits, context, x, bias, mode="exact").square().sum(),
            head + 0.1,
        ),
        "kd": (lambda x: dk.kd_loss(x, logits), rand(4, 3)),
    }


def by_autograd(function: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("name", functions())
def test_transforms_give_what_autograd_gives(name: str) -> None:
    function, x = functions()[name]
    other, direction = x + 0.1 * rand(*x.shape, seed=8), rand(*x.shape, seed=9)
    expected = by_autograd(function, x)
    assert expected.abs().max() > 1e-3, "or nothing is shown"
    torch.testing.assert_close(grad(function)(x), expected)
    torch.testing.assert_close(jacrev(function)(x), expected)
    torch.testing.assert_close(jacfwd(function)(x), expected)
    both = vmap(grad(function))(torch.stack([x, other]))
    torch.testing.assert_close(both, torch.stack([expected, by_autograd(function, other)]))
    along = (expected * direction).sum()
    value, tangent = jvp(function, (x,), (direction,))
    torch.testing.assert_close((value, tangent), (function(x), along))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent
        assert tangent is not None, "dropped without a word"
        torch.testing.assert_close(tangent.clone(), along)
    with dk.backend("eager"):
        y = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(y), y, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), y)
    torch.testing.assert_close((hessian(function)(x).flatten(-x.dim()) @ direction.flatten()), second)


def test_each_sample_may_have_its_own_labels_and_weight() -> None:
    student, teacher, weight = rand(3, 4, 6), rand(3, 4, 6, seed=1), rand(3, 4, seed=2)
    labels = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [2, 2, 2, 0]])
    for loss, given in ((dk.class_relation_loss, labels), (dk.feature_match_loss, weight)):
        found = vmap(loss)(student, teacher, given)
        expected = [loss(*one) for one in zip(student, teacher, given)]
        torch.testing.assert_close(found, torch.stack(expected))
    with pytest.raises(ValueError, match="labels must be >= 0"):  # still looked at where they can be
        grad(lambda x: dk.class_relation_loss(x, teacher[0], labels[0] - 1))(student[0])


def test_a_backend_that_cannot_be_transformed_is_refused_by_name() -> None:
    function, x = functions()["feature_match"]
    with dk.backend("cpp"), pytest.raises(BackendError, match="'cpp' was asked for but cannot run feature_match under"):
        grad(function)(x)
    with dk.backend("eager"):
        torch.testing.assert_close(grad(function)(x), by_autograd(function, x))


def test_what_gets_no_gradient_says_so_under_transforms_too() -> None:
    with pytest.raises(ValueError, match="teacher must not require grad"):
        grad(lambda teacher: dk.feature_match_loss(rand(2, 3), teacher))(rand(2, 3))
