"""Each image's own map: the batch's normalization statistics are held constant, in one forward pass."""

import copy

import pytest
import torch
from cases import normal
from torch import nn
from torch.nn import functional as F

import debiaskd as dk
from debiaskd.attribution import explanation_mode, grad_cam, input_x_gradient
from debiaskd.models.batch_statistics import constant_statistics
from debiaskd.models.zoo.bias_free import BiasFreeBatchNorm2d

pytestmark = pytest.mark.usefixtures("one_thread")
K, SIZE = 3, 12


class HandWritten(nn.Module):
    """Batch norm as one writes it."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x):
        var, mean = torch.var_mean(x, dim=(0, 2, 3), keepdim=True, correction=0)
        return (x - mean) / (var + 1e-5).sqrt() * self.weight[:, None, None]


def net(norm=nn.BatchNorm2d, dtype=torch.float64):
    """Norms below, between and above the layers that are looked at; the last map is not behind a closed form."""
    torch.manual_seed(1)
    layers = []
    for i, (inner, outer) in enumerate(((3, 6), (6, 8), (8, 6))):
        layers += [nn.Conv2d(inner, outer, 3, 2 if i == 1 else 1, 1), norm(outer), nn.Tanh()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, K)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "weight" in name and parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in name:
                parameter.normal_(std=0.3)
    return model.train()


def batch(n, dtype=torch.float64):
    images = normal(n, 3, SIZE, SIZE, dtype=dtype)
    boxes = dk.Boxes.from_lists([[[1 + i % 4, 2, 9, 6 + i % 5]] for i in range(n)])
    return images, torch.arange(n) % K, boxes


def with_the_batchs_statistics(model, images):
    """The network in eval mode whose running statistics are the batch's."""
    found = copy.deepcopy(model)
    for norm in (m for m in found.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.register_forward_pre_hook(_take)
    with torch.no_grad():
        found(images)
    return found.eval()


def _take(norm, arguments):
    (x,) = arguments
    if norm.training:
        dims = [d for d in range(x.dim()) if d != 1]
        norm.running_mean = x.mean(dims)
        norm.running_var = x.var(dims, unbiased=False)
        norm.momentum = 0.0


def one_by_one(model, layer, method, images, target):
    """The public code's way: one backward pass an image."""
    place = 0 if layer == "Input" else int(layer) + 1
    feature = model[:place](images.clone().requires_grad_())
    logits = model[place:](feature)
    maps = []
    for i in range(len(images)):
        (gradient,) = torch.autograd.grad(logits[i, target[i]], feature, retain_graph=True)
        if method == "grad_cam":
            maps.append((gradient[i].mean((1, 2), keepdim=True) * feature[i]).sum(0).relu())
        else:
            maps.append((gradient[i] * feature[i]).sum(0))
    return torch.stack(maps).detach()


NORMS = {
    "batch": nn.BatchNorm2d,
    "group": lambda c: nn.GroupNorm(2, c),
    "layer": lambda c: nn.GroupNorm(1, c),
}


@pytest.mark.parametrize("method", ("input_x_gradient", "grad_cam"))
@pytest.mark.parametrize("layer", ("Input", "2", "5"))
@pytest.mark.parametrize("norm", NORMS)
def test_maps_in_training_are_those_of_evaluation_with_the_same_statistics(norm, layer, method):
    model, (images, target, boxes) = net(NORMS[norm]), batch(8)
    fixed = with_the_batchs_statistics(model, images)
    logits, loss, maps = dk.Guide(model, layer, method)(images, target, boxes)
    torch.testing.assert_close(maps, one_by_one(fixed, layer, method, images, target))
    evaluated = dk.Guide(fixed, layer, method)(images, target, boxes)
    torch.testing.assert_close(maps, evaluated.attribution)
    torch.testing.assert_close(loss, evaluated.loss)
    torch.testing.assert_close(logits, evaluated.logits)


def test_integrated_gradients_go_along_their_path_with_the_batchs_statistics():
    model, (images, target, _) = net(), batch(8)
    fixed = with_the_batchs_statistics(model, images)
    for layer in ("Input", "2"):
        maps = [dk.Guide(m, layer, "integrated_gradients", steps=3).attribute(images, target) for m in (model, fixed)]
        torch.testing.assert_close(*maps)
        path = dk.Guide(model, layer, "integrated_gradients", steps=60).attribute(images, target)
        place = 0 if layer == "Input" else 3
        with torch.no_grad():
            feature = fixed[:place](images)
            change = fixed[place:](feature) - fixed[place:](torch.zeros_like(feature))
        torch.testing.assert_close(path.sum((1, 2)), change.gather(1, target[:, None])[:, 0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", ("input_x_gradient", "grad_cam"))
def test_own_statistics_are_one_backward_pass_an_image(method):
    model, (images, target, boxes) = net(), batch(8)
    expected = one_by_one(model, "2", method, images, target)
    logits, loss, maps = dk.Guide(model, "2", method, statistics="own")(images, target, boxes)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(logits, model(images))
    torch.testing.assert_close(loss, dk.energy_loss(expected, boxes, size=(SIZE, SIZE)))


def test_own_statistics_along_a_path_move_one_image_at_a_time():
    model, (images, target, _) = net(), batch(4)
    maps = dk.Guide(model, "2", "integrated_gradients", steps=2, statistics="own").attribute(images, target)
    feature = model[:3](images).detach()
    for i in range(4):
        total = 0
        for step in (0.25, 0.75):
            moved = feature.clone()
            moved[i] *= step
            moved.requires_grad_()
            (gradient,) = torch.autograd.grad(model[3:](moved)[i, target[i]], moved)
            total = total + (gradient[i] * feature[i]).sum(0) / 2
        torch.testing.assert_close(maps[i], total)


def relative(found, expected):
    return float((found.detach() - expected).norm() / expected.norm())


@pytest.mark.parametrize("layer", ("Input", "2", "5"))
def test_the_difference_to_own_statistics_fades_with_the_batch(layer):
    off, model = {}, net()
    for n in (8, 32, 128):
        images, target, _ = batch(n)
        own = one_by_one(model, layer, "input_x_gradient", images, target)
        off[n] = relative(dk.Guide(model, layer).attribute(images, target), own)
    assert off[8] > 0.05, "they do differ"
    assert off[32] < off[8] / 3 and off[128] < off[32] / 3, off


def test_so_does_the_difference_of_a_losss_gradient():
    off = {}
    for n in (8, 32, 128):
        images, target = batch(n)[0][:, :, :6, :6], torch.zeros(n, dtype=torch.int64)
        boxes, found = dk.Boxes.from_lists([[[1, 2, 5, 4]]] * n), []
        for statistics in ("constant", "own"):
            model = net()
            maps = dk.Guide(model, "5", statistics=statistics)(images, target, boxes).attribution
            maps.square().mean().backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        off[n] = relative(*found)
    assert off[8] > 0.05 and off[32] < off[8] / 2.5 and off[128] < off[32] / 2.5, off


def test_pytorchs_own_batch_norm_mixes_images_at_any_size():
    """Why the forward pass has to be run within the context."""
    for n in (8, 128):
        model, (images, target, _) = net(), batch(n)
        images.requires_grad_()
        mixed = input_x_gradient(model(images), images, target)
        own = one_by_one(model, "Input", "input_x_gradient", images, target)
        assert relative(mixed, own) > 0.3


@pytest.mark.parametrize("layer", ("Input", "2", "5"))
def test_the_losss_gradient_is_that_of_its_value(layer):
    """By differences: nothing is held constant there, the spread of the batch that divides the map included."""
    model, (images, target, boxes) = net(), batch(6)
    guide = dk.Guide(model, layer)
    guide(images, target, boxes).loss.backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        direction = normal(*parameter.shape, dtype=torch.float64)
        step, values = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                values.append(guide(images, target, boxes).loss)
                parameter.sub_(sign * step * direction)
        numeric = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close((parameter.grad * direction).sum(), numeric, rtol=1e-5, atol=1e-8)


def test_the_losss_gradient_is_that_of_the_definition():
    """One backward pass an image, statistics given as constants of it, and the chain rule by hand for the rest."""
    model, (images, target, boxes) = net(), batch(8)
    below, norm, above = model[:4], model[4], model[5:]
    feature = below[:3](images)
    kept = feature.detach().requires_grad_()
    before = below[3](kept)
    mean, var = before.mean((0, 2, 3)), before.var((0, 2, 3), unbiased=False)
    held = [value.detach().requires_grad_() for value in (mean, var)]
    last = above[1](above[0](F.batch_norm(before, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)))
    held += [v.detach().requires_grad_() for v in (last.mean((0, 2, 3)), last.var((0, 2, 3), unbiased=False))]

    def normalized(x, mean, var, layer):
        x = (x - mean[:, None, None]) / (var[:, None, None] + layer.eps).sqrt()
        return x * layer.weight[:, None, None] + layer.bias[:, None, None]

    def head(a):
        a = above[1](above[0](normalized(below[3](a), held[0], held[1], norm)))
        return above[3:](normalized(a, held[2], held[3], above[2]))

    logits = head(kept)
    rows = [torch.autograd.grad(logits[i, target[i]], kept, create_graph=True)[0][i] for i in range(8)]
    loss = dk.energy_loss((torch.stack(rows) * kept).sum(1), boxes, size=(SIZE, SIZE))
    parameters = list(model.parameters())
    direct = torch.autograd.grad(loss, [kept, *held, *parameters], allow_unused=True, retain_graph=True)
    again = below[3](feature)
    mean, var = again.mean((0, 2, 3)), again.var((0, 2, 3), unbiased=False)
    last = above[1](above[0](normalized(again, mean, var, norm)))
    ends = [feature, mean, var, last.mean((0, 2, 3)), last.var((0, 2, 3), unbiased=False)]
    indirect = torch.autograd.grad(ends, parameters, direct[:5], allow_unused=True)
    model.zero_grad()
    dk.Guide(model, "2")(images, target, boxes).loss.backward()
    assert all(gradient.any() for gradient in direct[1:3])
    for parameter, first, second in zip(parameters, direct[5:], indirect):
        expected = sum((part for part in (first, second) if part is not None), torch.zeros_like(parameter))
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("momentum", (0.1, None))
def test_the_task_and_the_running_statistics_are_as_without_a_guide(momentum):
    images, target, boxes = batch(8)
    results = []
    for guided in (False, True):
        model = net(lambda c: nn.BatchNorm2d(c, momentum=momentum))
        logits = dk.Guide(model, "2", weight=0.0)(images, target, boxes).logits if guided else model(images)
        F.cross_entropy(logits, target).backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers(), logits])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)


def _evo(kind):
    return lambda c: getattr(pytest.importorskip("timm").layers, kind)(c)


def _timm_act(c):
    return pytest.importorskip("timm").layers.BatchNormAct2d(c, act_layer=nn.SiLU)


def _bcos(kind):
    return lambda c: getattr(pytest.importorskip("bcos.modules.norms"), kind)(c)


OTHERS = {
    "batch norm and activation": _timm_act,
    "split batch norm": lambda c: pytest.importorskip("timm").layers.SplitBatchNorm2d(c, num_splits=2),
    "evonorm b0": _evo("EvoNorm2dB0"),
    "evonorm b1": _evo("EvoNorm2dB1"),
    "evonorm b2": _evo("EvoNorm2dB2"),
    "b-cos": _bcos("BatchNorm2d"),
    "b-cos uncentred": _bcos("BatchNormUncentered2d"),
    "b-cos all": _bcos("AllNormUncentered2d"),
    "b-cos all centred": _bcos("AllNorm2d"),
    "bias-free": BiasFreeBatchNorm2d,
    "by hand": HandWritten,
    "no running statistics": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "no affine": lambda c: nn.BatchNorm2d(c, affine=False),
}


@pytest.mark.parametrize("norm", OTHERS)
def test_every_norm_of_the_batch_is_held(norm):
    """No image's map depends on another image's logits, and the maps are nearly those through the statistics."""
    model, (images, target, boxes) = net(OTHERS[norm]), batch(32)
    constant, own = (dk.Guide(model, "2", statistics=statistics) for statistics in ("constant", "own"))
    maps = constant(images, target, boxes).attribution
    other = target.clone()
    other[1:] = (target[1:] + 1) % K
    torch.testing.assert_close(constant(images, other, boxes).attribution[0], maps[0])
    assert relative(maps, own.attribute(images, target)) < 0.1


class Centred(nn.Module):
    """Makes every image a matter of all others in a way that is no mean, variance or standard deviation."""

    def forward(self, x):
        return x - 0.5 * x.amax(0, keepdim=True)


def test_images_that_depend_on_each_other_otherwise_are_refused():
    model, (images, target, boxes) = net(lambda c: Centred()), batch(8)
    with pytest.raises(ValueError, match=r"model must treat the images of a batch apart.*statistics=\"own\""):
        dk.Guide(model, "2")(images, target, boxes)
    maps = dk.Guide(model, "2", statistics="own").attribute(images, target)
    torch.testing.assert_close(maps, one_by_one(model, "2", "input_x_gradient", images, target))


def test_bad_statistics_are_named():
    with pytest.raises(ValueError, match=r"statistics must be one of.*constant"):
        dk.Guide(net(), statistics="running")


def test_b_cos_explanations_in_training_are_each_images_own():
    modules = pytest.importorskip("bcos.modules")
    torch.manual_seed(0)
    norm = modules.norms.BatchNormUncentered2d
    layers = [modules.BcosConv2d(3, 6, 3, padding=1), norm(6), modules.BcosConv2d(6, K, 3, padding=1), norm(K)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().train()
    images, target, boxes = batch(8)
    maps = dk.Guide(model, "0", "bcos")(images, target, boxes).attribution
    with explanation_mode(model):
        expected = one_by_one(model, "0", "input_x_gradient", images, target)
    torch.testing.assert_close(maps, expected)


def test_autocast_keeps_the_maps_and_the_gradients_close():
    images, target, boxes = batch(8, torch.float32)
    found = []
    for enabled in (False, True):
        model = net(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            _, loss, maps = dk.Guide(model, "2")(images, target, boxes)
        loss.backward()
        found.append(
            (maps.float().detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        )
    for half, full in zip(found[1], found[0]):
        assert F.cosine_similarity(half.flatten(), full.flatten(), dim=0) > 0.97


def test_functions_give_own_maps_of_a_pass_within_the_context():
    model, (images, target, _) = net(), batch(8)
    fixed = with_the_batchs_statistics(model, images)
    with constant_statistics(model):
        feature = model[:3](images)
        logits = model[3:](feature)
    torch.testing.assert_close(
        grad_cam(logits, feature, target).detach(), one_by_one(fixed, "2", "grad_cam", images, target)
    )
