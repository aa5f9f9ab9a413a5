"""Attribution maps: against captum, the papers' code, and each other; and through them, gradients."""

import numpy as np
import pytest
import torch
from cases import GOLDEN, normal
from torch import nn

import debiaskd as dk
from debiaskd.attribution.gradients import logit_gradients
from debiaskd.attribution.maps import (
    draw_target,
    explanation_mode,
    final_layer_map,
    grad_cam,
    input_x_gradient,
    integrated_gradients,
)

captum = pytest.importorskip("captum.attr")
pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A body and a head that is not linear."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.Tanh(), nn.Conv2d(5, 6, 3, padding=1), nn.Softplus())
        self.head = nn.Sequential(nn.Conv2d(6, 4, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(7))
        self.double()(torch.zeros(1, 3, 12, 10, dtype=torch.float64))

    def forward(self, images):
        return self.head(self.body(images))


@pytest.fixture
def net():
    torch.manual_seed(3)
    return Net()


TARGET = torch.tensor([0, 3, 6, 3])


def images():
    return normal(4, 3, 12, 10, dtype=torch.float64)


def test_input_x_gradient_is_captums(net):
    x = images().requires_grad_()
    ours = input_x_gradient(net(x), x, TARGET)
    torch.testing.assert_close(ours, captum.InputXGradient(net).attribute(x, target=TARGET).sum(1).detach())


def test_grad_cam_is_captums(net):
    feature = net.body(images())
    ours = grad_cam(net.head(feature), feature, TARGET)
    theirs = captum.LayerGradCam(net, net.body).attribute(images(), target=TARGET, relu_attributions=True)
    torch.testing.assert_close(ours, theirs[:, 0].detach())


def test_integrated_gradients_are_captums_and_complete(net):
    baseline = normal(1, 3, 12, 10, seed=5, dtype=torch.float64)
    ours = integrated_gradients(net, images(), TARGET, baseline=baseline, steps=20)
    captums = captum.IntegratedGradients(net)
    theirs = captums.attribute(images(), baseline, TARGET, n_steps=20, method="riemann_middle").sum(1)
    torch.testing.assert_close(ours, theirs)
    change = (net(images()) - net(baseline)).gather(1, TARGET[:, None])[:, 0].detach()
    torch.testing.assert_close(ours.sum((1, 2)), change, rtol=1e-2, atol=1e-2)


def test_maps_of_the_papers_code_are_reproduced():
    with np.load(GOLDEN / "attribution.npz") as file:
        g = {k: torch.as_tensor(file[k]) for k in file.files}
    for i in sorted({key.split("_")[0] for key in g}):
        feature, gradient = g[f"{i}_feature"].clone().requires_grad_(), g[f"{i}_gradient"]
        logits = (feature * gradient).sum((1, 2, 3))[:, None]  # whose gradient is that
        zero = torch.zeros(len(feature), dtype=torch.int64)
        torch.testing.assert_close(input_x_gradient(logits, feature, zero), g[f"{i}_ixg"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grad_cam(logits, feature, zero), g[f"{i}_gradcam"], rtol=1e-4, atol=1e-5)
        closed = final_layer_map(feature, g[f"{i}_cam_weight"], g[f"{i}_target"])
        torch.testing.assert_close(closed, g[f"{i}_cam_ixg"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(closed.relu(), g[f"{i}_cam_gradcam"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", (input_x_gradient, grad_cam))
def test_several_classes_are_the_maps_of_each(net, method):
    feature = net.body(images())
    logits, several = net.head(feature), torch.stack([TARGET, TARGET * 0, (TARGET + 1) % 7], 1)
    maps = method(logits, feature, several)
    assert maps.shape == (4, 3, *feature.shape[2:])
    for k in range(3):
        torch.testing.assert_close(maps[:, k], method(logits, feature, several[:, k]))
    paths = integrated_gradients(net.head, feature, several, steps=2)
    torch.testing.assert_close(paths[:, 2], integrated_gradients(net.head, feature, several[:, 2], steps=2))
    weight = normal(7, 6, dtype=torch.float64)
    closed = final_layer_map(feature, weight, several)
    torch.testing.assert_close(closed[:, 1], final_layer_map(feature, weight, several[:, 1]))


def test_closed_form_is_what_autograd_gives():
    feature = normal(3, 5, 4, 6, dtype=torch.float64).requires_grad_()
    head = nn.Linear(5, 4).double()
    target = torch.tensor([1, 3, 0])
    logits = head(feature.mean((2, 3)))
    closed = final_layer_map(feature, head.weight, target)
    torch.testing.assert_close(closed, input_x_gradient(logits, feature, target))
    torch.testing.assert_close(closed.relu(), grad_cam(logits, feature, target))
    torch.testing.assert_close(closed, integrated_gradients(lambda a: head(a.mean((2, 3))), feature, target, steps=3))


@pytest.mark.parametrize("method", (input_x_gradient, grad_cam, "integrated_gradients"))
def test_maps_can_be_trained_through(net, method):
    weight = net.body[0].weight

    def loss(value):
        feature = torch.func.functional_call(net.body, {"0.weight": value}, (images(),))
        if method == "integrated_gradients":
            maps = integrated_gradients(net.head, feature, TARGET, steps=2, create_graph=True)
        else:
            maps = method(net.head(feature), feature, TARGET, create_graph=True)
        return maps.square().sum()

    assert torch.autograd.gradcheck(loss, weight.detach().clone().requires_grad_(), fast_mode=True)


def test_without_create_graph_there_is_none(net):
    x = images().requires_grad_()
    for maps in (
        input_x_gradient(net(x), x, TARGET),
        grad_cam(net(x), x, TARGET),
        integrated_gradients(net, x, TARGET, steps=1),
    ):
        assert not maps.requires_grad


def test_explanation_mode_is_left_as_it_was():
    class Layer(nn.Module):
        is_in_explanation_mode = False

        def set_explanation_mode(self, active):
            self.is_in_explanation_mode = active

    model = nn.Sequential(Layer(), Layer())
    model[1].set_explanation_mode(True)
    with pytest.raises(RuntimeError, match="on purpose"), explanation_mode(model):
        assert all(layer.is_in_explanation_mode for layer in model)
        raise RuntimeError("on purpose")
    assert [layer.is_in_explanation_mode for layer in model] == [False, True]
    with pytest.raises(ValueError, match="model must hold B-cos layers"), explanation_mode(nn.Linear(1, 1)):
        pass


def test_drawn_classes_are_positive_and_all_as_likely():
    labels = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).repeat(3000, 1, 1)
    drawn = torch.stack([draw_target(each) for each in labels[:100]])
    assert set(drawn[:, 0].tolist()) == {1, 3, 4}
    assert set(drawn[:, 1].tolist()) == {4}
    assert set(drawn[:, 2].tolist()) == {-1}
    many = draw_target(labels[:, 0], torch.Generator().manual_seed(0)).bincount(minlength=5) / 3000
    torch.testing.assert_close(many, torch.tensor([0, 1, 0, 1, 1]) / 3, atol=0.03, rtol=0)
    again = draw_target(labels[:, 0].bool(), torch.Generator().manual_seed(0)).bincount(minlength=5) / 3000
    assert torch.equal(many, again)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: input_x_gradient(x.sum((2, 3)), x.detach(), TARGET), ValueError, "feature must require grad"),
        (lambda x: input_x_gradient(torch.ones(4, 7, requires_grad=True), x, TARGET), ValueError, "do not depend"),
        (lambda x: input_x_gradient(x.sum((2, 3)), x, TARGET), ValueError, r"target must lie in \[0,K\)=\[0,3\)"),
        (lambda x: input_x_gradient(x.sum((2, 3)), x, TARGET[:3]), ValueError, r"target must have shape \[N\]=\[4\]"),
        (lambda x: input_x_gradient(x.sum((2, 3)), x, TARGET.int()), TypeError, "target must be int64"),
        (lambda x: input_x_gradient(x.sum((2, 3)), x, TARGET[:, None][:, :0]), ValueError, "at least one class"),
        (lambda x: input_x_gradient(x.sum(3), x, TARGET), ValueError, r"logits must have shape \[N,K\]"),
        (lambda x: grad_cam(x.sum((2, 3)), x[0], TARGET), ValueError, r"feature must have shape \[N,C,H,W\]"),
        (lambda x: integrated_gradients(lambda a: a.sum((2, 3)), x, TARGET, steps=0), ValueError, "steps must be"),
        (
            lambda x: integrated_gradients(lambda a: a.sum((2, 3)), x, TARGET, baseline=x[0, 0, 0, :2]),
            ValueError,
            "baseline must",
        ),
        (lambda x: integrated_gradients(lambda a: a.sum((2, 3)), x, TARGET, baseline="0"), TypeError, "baseline"),
        (lambda x: final_layer_map(x, torch.ones(7, 2), TARGET), ValueError, r"weight must have shape \[K,C\]"),
        (lambda x: draw_target(torch.ones(3)), ValueError, r"labels must have shape \[N,K\]"),
        (lambda x: logit_gradients(x.sum((2, 3))[:2], x, TARGET), ValueError, r"logits must have shape"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(normal(4, 3, 6, 5).requires_grad_())


def test_half_precision_under_autocast_stays_close():
    torch.manual_seed(0)
    net = Net().float()
    x = images().float()
    feature = net.body(x)
    exact = input_x_gradient(net.head(feature), feature, TARGET)
    with torch.autocast("cpu", torch.bfloat16):
        feature = net.body(x)
        maps = input_x_gradient(net.head(feature), feature, TARGET, create_graph=True)
    assert (maps - exact).abs().max() < 0.05 * exact.abs().max()
    dk.energy_loss(maps, dk.Boxes.from_lists([[[0, 0, 3, 3]]] * 4)).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    assert net.body[0].weight.grad.abs().sum() > 0
