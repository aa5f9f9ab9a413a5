"""Maps that explanations are compared by: their values against independent float64 code, and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import debiaskd as dk


class Net(nn.Module):
    """Two convolutions, global average pooling and a linear layer, without batch norm, in float64."""

    def __init__(self, width: int, stride: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.last = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, width, 3, stride, 1)
            self.act, self.fc = nn.Tanh(), nn.Linear(width, 3)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.act(self.last(self.first(images).tanh())).mean((2, 3)))


def by_hand(net: Net, images: Tensor, target: Tensor, kind: str) -> Tensor:
    """`Σ_c W_kc A_c / (HW)`, or its positive part, by loops over images and channels."""
    feature, maps = net.last(net.first(images).tanh()).tanh(), []
    for i, k in enumerate(target.tolist()):
        total = sum(net.fc.weight[k, c] * feature[i, c] for c in range(feature.shape[1]))
        maps.append(total / feature[i, 0].numel())
    found = torch.stack(maps)
    return found.clamp(min=0) if kind == "grad_cam" else found


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over images of 1 - cos, the student's maps brought to the teacher's size."""
    student = F.interpolate(student[:, None], size=teacher.shape[1:], mode="bilinear")[:, 0]
    each = [1 - (s * t).sum() / (s.norm() * t.norm()) for s, t in zip(student, teacher)]
    return torch.stack(each).mean()


IMAGES = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["grad_cam", "input_x_gradient"])
def test_the_closed_form_of_both_networks_gives_the_loss_and_gradient_of_the_formula(kind: str) -> None:
    teacher, student = Net(8, 1, 0).eval(), Net(5, 2, 1)
    explainer = dk.Explainer(student, "act", kind)
    taught = dk.Explainer(teacher, "act", kind).explain(IMAGES)
    assert taught.target.tolist() == teacher(IMAGES).argmax(1).tolist()
    assert not taught.maps.requires_grad
    logits, target, maps = explainer(IMAGES, taught.target)
    assert target is taught.target
    torch.testing.assert_close(logits, student(IMAGES))
    loss = dk.map_cosine_loss(maps, taught.maps)
    expected = cosine_loss(by_hand(student, IMAGES, target, kind), by_hand(teacher, IMAGES, target, kind).detach())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    found = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(expected, list(student.parameters()), allow_unused=True)
    for one, other in zip(found, wanted):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)


def test_maps_of_an_earlier_layer_are_gradients_that_can_be_trained_through() -> None:
    student, target = Net(5, 2, 1), torch.tensor([0, 2, 1, 0])
    maps = dk.Explainer(student, "first", "input_x_gradient")(IMAGES, target).maps
    feature = student.first(IMAGES)
    scores = student.fc(student.last(feature.tanh()).tanh().mean((2, 3)))[torch.arange(4), target]
    (gradient,) = torch.autograd.grad(scores.sum(), feature, create_graph=True)
    expected = (gradient * feature).sum(1)
    torch.testing.assert_close(maps, expected, rtol=1e-9, atol=1e-14)
    teacher = torch.ones_like(expected).detach()
    found = torch.autograd.grad(dk.map_cosine_loss(maps, teacher), student.last.weight)[0]
    wanted = torch.autograd.grad(cosine_loss(expected, teacher), student.last.weight)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-14)


def test_without_gradients_a_call_gives_the_same_maps_without_a_graph() -> None:
    explainer = dk.Explainer(Net(5, 2, 1), "last")
    expected = explainer(IMAGES)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = explainer(IMAGES)
        assert not found.maps.requires_grad
        torch.testing.assert_close(found.maps, expected.maps.detach())


def test_weights_of_a_bcos_network_are_its_gradient_at_the_input_in_explanation_mode() -> None:
    pytest.importorskip("bcos")
    from debiaskd.attribution import explanation_mode
    from debiaskd.models.registry import build

    torch.manual_seed(0)
    model = build("bcos/cifar10_resnet20", 3).double().eval()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    images = torch.cat([images, 1 - images], 1)
    explainer = dk.Explainer(model)
    assert (explainer.layer, explainer.explanation) == ("Input", "bcos_weights")
    _, target, maps = explainer(images)
    assert maps.shape == (2, 6, 16, 16)
    leaf = images.clone().requires_grad_()
    with explanation_mode(model):
        (expected,) = torch.autograd.grad(model(leaf)[torch.arange(2), target].sum(), leaf)
    torch.testing.assert_close(maps.detach(), expected)
    dk.map_cosine_loss(maps, torch.ones_like(expected)).backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"attribution must be one of 'grad_cam', .*got 'bcos'"):
        dk.Explainer(Net(5, 2, 1), "last", "bcos")
    with pytest.raises(ValueError, match="layer must be 'Input' for bcos_weights, got 'last'"):
        dk.Explainer(Net(5, 2, 1), "last", "bcos_weights")
    with pytest.raises(ValueError, match="model must hold B-cos layers"):
        dk.Explainer(Net(5, 2, 1), attribution="bcos_weights")
    with pytest.raises(TypeError, match=r"target must be a torch\.Tensor, got list"):
        dk.Explainer(Net(5, 2, 1), "last")(IMAGES, [0, 1, 2, 0])  # type: ignore[arg-type]
