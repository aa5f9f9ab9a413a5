"""Layers with a cheap second derivative give the gradients that PyTorch's own give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import debiaskd as dk
from debiaskd.attribution import input_x_gradient
from debiaskd.models import batch_statistics, second_order
from debiaskd.models.batch_statistics import constant_statistics
from debiaskd.models.second_order import Geometry, InputGradient, Shape
from debiaskd.models.second_order_calls import CALLS


def net() -> nn.Module:
    """Every way that the layers are put together: folded norms, none, a fork, groups, stride, pooling, a bias."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
            self.pool = nn.MaxPool2d(3, 2, 1)
            self.first, self.first_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
            self.second = nn.Conv2d(8, 12, 3, 2, 2, 2, groups=2)
            self.side, self.side_norm = nn.Conv2d(8, 12, 1, 2), nn.BatchNorm2d(12)
            self.head = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(F.relu(self.norm(self.stem(x)), inplace=True))
            y = self.second(torch.relu(self.first_norm(self.first(x))))
            return self.head((y + self.side_norm(self.side(x))).relu().mean((2, 3)))

    torch.manual_seed(3)
    return Net().double().train()


def guided_step(layer: str, model: nn.Module, statistics: str = "constant") -> list[Tensor]:
    images = torch.randn(3, 3, 21, 22, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = torch.tensor([0, 2, 3])
    boxes = dk.Boxes.from_lists([[[2, 2, 12, 14]], [[0, 0, 9, 9]], None])
    guide = dk.Guide(model, layer, statistics=statistics)
    guide.use_gradients()
    logits, loss, maps = guide(images, target, boxes)
    (F.cross_entropy(logits, target) + loss).backward()
    return [logits, maps, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize(
    ("layer", "statistics"),
    [("Input", "constant"), ("pool", "constant"), ("first", "constant"), ("first_norm", "constant"), ("pool", "own")],
)
def test_a_guided_step_is_that_of_pytorchs_layers(layer, statistics, monkeypatch) -> None:
    model = net()
    found = guided_step(layer, copy.deepcopy(model), statistics)
    plain = {name: call for name, call in batch_statistics._HANDLERS.items() if name not in CALLS}
    monkeypatch.setattr(batch_statistics, "_HANDLERS", plain)
    for actual, expected in zip(found, guided_step(layer, model, statistics)):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_norms_are_folded_only_where_nobody_asks_for_the_convolutions_output(monkeypatch) -> None:
    folded = []
    apply = second_order.NormalizedConvolution.apply

    def noted(x: Tensor, *others: object) -> object:
        folded.append(x.shape)
        return apply(x, *others)

    monkeypatch.setattr(second_order.NormalizedConvolution, "apply", noted)
    for layer, count in (("Input", 3), ("first", 2)):
        folded.clear()
        guided_step(layer, net())
        assert len(folded) == count
    model, images = net(), torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    folded.clear()
    with constant_statistics(model):
        model(images)
    assert not folded


def test_any_map_can_be_explained_by_the_functions() -> None:
    model, caught = net(), []
    model.first.register_forward_hook(lambda module, arguments, output: caught.append(output))
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    with constant_statistics(model):
        logits = model(images)
    target = torch.tensor([0, 2])
    assert input_x_gradient(logits, caught[0], target).abs().sum() > 0
    assert input_x_gradient(logits, images, target, create_graph=True).requires_grad
    logits.sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("kernel", "geometry"),
    [
        (3, Geometry((1, 1), (1, 1), (1, 1), 1)),
        (3, Geometry((2, 1), (0, 2), (1, 2), 2)),
        (5, Geometry((2, 2), (2, 2), (1, 1), 1)),
    ],
)
def test_the_input_gradient_is_differentiable_three_times(kernel, geometry, scaled) -> None:
    x = torch.randn(2, 4, 8, 7, dtype=torch.float64)
    w = torch.randn(6, 4 // geometry.groups, kernel, kernel, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(torch.conv2d(x, w, None, *geometry)).requires_grad_()
    scale = torch.rand(6, dtype=torch.float64).add(0.5).requires_grad_() if scaled else None

    def call(g: Tensor, w: Tensor, scale: Tensor | None = None) -> Tensor:
        return InputGradient.apply(g, w, scale, Shape.of(x), geometry)

    inputs = (g, w) if scale is None else (g, w, scale)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize(("kernel", "padding"), [(7, 3), (3, 1), (3, 0), (4, 1), (2, 0), (1, 0), (5, 4)])
@pytest.mark.parametrize("size", [(16, 16), (15, 18)])
def test_the_gradient_by_phases_is_that_of_convolution_backward(kernel, padding, size) -> None:
    x, w = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(8, 3, kernel, kernel, dtype=torch.float64)
    g = torch.randn_like(torch.conv2d(x, w, None, 2, padding))
    expected = torch.nn.grad.conv2d_input(x.shape, w, g, 2, padding)
    shape = Geometry((2, 2), (padding, padding), (1, 1), 1)
    torch.testing.assert_close(second_order.input_gradient(g, w, Shape.of(x), shape), expected)
    found = second_order._by_phases(g, w, size, (padding, padding))
    if kernel == 7:
        assert found is not None
    if found is not None:
        torch.testing.assert_close(found, expected)
