"""Guidance: loss and gradients of a guided step, at every depth, by every attribution, for every kind of model."""

import copy
import math

import pytest
import timm
import torch
import torchvision
from cases import normal
from torch import nn

import debiaskd as dk
from debiaskd.attribution import explanation_mode, final_layer_map, grad_cam, input_x_gradient, integrated_gradients
from debiaskd.models import SmallNet, depths

pytestmark = pytest.mark.usefixtures("one_thread")
BOXES = dk.Boxes.from_lists([[[2, 3, 14, 20]], None, [], [[0, 0, 9, 9], [20, 20, 32, 32]]])
TARGET = torch.tensor([1, 0, 2, 2])


def net(**options):
    torch.manual_seed(1)
    return SmallNet((6, 8, 8), (1, 2, 2), 3).double(**options)


def images(size=32):
    return normal(4, 3, size, size, dtype=torch.float64)


def by_hand(model, layer, method, kind, weight, target=TARGET, boxes=BOXES):
    """A guided step written out for SmallNet: the graph of everything, nothing closed."""
    x = images().requires_grad_()
    at = {"Input": 0, "body.relu1": 3, "body.relu2": 6, "Final": 9}[layer]
    feature = model.body[:at](x)

    def head(a):
        return model.fc(model.body[at:](a).mean((2, 3)))

    logits = head(feature)
    if method == "integrated_gradients":
        maps = integrated_gradients(head, feature, target, steps=3, create_graph=True)
    else:
        function = {"input_x_gradient": input_x_gradient, "grad_cam": grad_cam}[method]
        maps = function(logits, feature, target, create_graph=True)
    size = tuple(x.shape[2:])
    loss = weight * dk.localization_loss(maps, boxes, kind=kind, size=size, normalize=True)
    return logits, loss, maps


@pytest.mark.parametrize("kind", ("energy", "l1", "ppce", "rrr"))
@pytest.mark.parametrize("method", ("input_x_gradient", "grad_cam", "integrated_gradients"))
@pytest.mark.parametrize("layer", ("Input", "body.relu1", "body.relu2", "Final"))
def test_a_guided_step_is_the_one_written_out(layer, method, kind):
    model = net().eval()
    guide = dk.Guide(model, layer, method, kind, 0.3, steps=3)
    for _ in range(2):  # the first batch decides on the closed form, later ones use it
        results = []
        for step in (guide(images(), TARGET, BOXES), by_hand(model, layer, method, kind, 0.3)):
            total = step[1] + nn.functional.cross_entropy(step[0], TARGET)
            results.append((*step, *torch.autograd.grad(total, list(model.parameters()), allow_unused=True)))
        for ours, expected in zip(*results):
            torch.testing.assert_close(ours, expected)
    assert guide.closed_form == (layer == "Final")


@pytest.mark.parametrize("training", (False, True))
def test_closed_form_leaves_no_graph_of_the_second_order(training):
    guide = dk.Guide(net().train(training))
    _, loss, _ = guide(images(), TARGET, BOXES)
    names, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node.name() not in names:
            names.add(node.name())
            stack += [following for following, _ in node.next_functions]
    assert guide.closed_form
    assert not any("BackwardBackward" in name for name in names)
    _, loss, _ = dk.Guide(net(), "body.relu1")(images(), TARGET, BOXES)
    assert loss.grad_fn is not None


def test_a_head_that_is_not_linear_is_noticed():
    model = net().eval()
    model.forward_head = lambda feature: model.fc(feature.amax((2, 3)))
    guide = dk.Guide(model)
    guide(images(), TARGET, BOXES)
    assert guide.closed_form is False
    model = net().train()
    model.forward_head = lambda feature: model.fc(nn.functional.dropout(feature.mean((2, 3)), 0.5))
    guide = dk.Guide(model)
    guide(images(), TARGET, BOXES)
    assert guide.closed_form is False


def test_dropout_is_noticed_though_the_model_was_evaluated_first():
    model = net()
    model.forward_head = lambda feature: model.fc(nn.functional.dropout(feature.mean((2, 3)), 0.5, model.training))
    guide = dk.Guide(model.eval())
    guide(images(), TARGET, BOXES)
    assert guide.closed_form
    model.train()
    assert guide.closed_form is None
    maps = guide(images(), TARGET, BOXES).attribution
    assert guide.closed_form is False
    closed = final_layer_map(model.body(images()), model.fc.weight, TARGET)
    assert not torch.allclose(maps, closed), "what dropout left out is no evidence"


def test_a_transplanted_student_is_guided_by_its_frozen_row():
    teacher, student = SmallNet((8, 12), (2, 2), 3), SmallNet((4, 5), (2, 2), 3)
    model = dk.transplant(teacher, student)
    guide = dk.Guide(model)
    logits, loss, maps = guide(images().float(), TARGET, BOXES)
    assert guide.closed_form
    torch.testing.assert_close(
        maps.sum((1, 2)) + model.get_classifier().bias[TARGET], logits.gather(1, TARGET[:, None])[:, 0]
    )
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if "fc" not in str(p))


@pytest.mark.parametrize("layer", depths.DEPTHS)
@pytest.mark.parametrize(
    "name", ("resnet10t", "convnext_atto", "vit_tiny_patch16_224", "swin_s3_tiny_224", "efficientnet_b0")
)
def test_timm_models_need_no_names(name, layer):
    torch.manual_seed(0)
    options = {"img_size": 64} if "vit" in name or "swin" in name else {}
    if "vit" in name:
        options |= {"depth": 4, "global_pool": "avg", "class_token": False}
    if "swin" in name:
        options |= {"depths": (1, 1, 1, 1), "window_size": 2}
    model = timm.create_model(name, num_classes=3, **options).eval()
    guide = dk.Guide(model, layer)
    picture = normal(2, 3, 64, 64)
    logits, loss, maps = guide(picture, TARGET[:2], BOXES[:2])
    torch.testing.assert_close(logits, model(picture), rtol=1e-3, atol=1e-4)
    assert maps.shape[1] == {"Input": 64}.get(layer, maps.shape[2])
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    if layer == "Final":
        assert guide.closed_form == (name not in ("convnext_atto", "vit_tiny_patch16_224"))  # which normalize behind it


def test_stages_of_a_resnet_are_its_depths():
    for model, prefix in ((timm.create_model("resnet18"), "layer"), (torchvision.models.resnet18(), "layer")):
        found = [depths.find(model, depth, torch.zeros(1, 3, 64, 64)).module for depth in depths.DEPTHS]
        assert found == [None, *(f"{prefix}{i}" for i in range(1, 5))]
    channels = (3, 4, 4, 4, 4)
    layers = [layer for c in channels for layer in (nn.Conv2d(c, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
    flat = nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = [depths.find(flat, depth, torch.zeros(1, 3, 64, 64)).module for depth in depths.DEPTHS]
    assert found == [None, "0.7", "0.10", "0.13", "0"]


def test_classes_and_images_that_do_not_count():
    model = net().eval()
    labelled = dk.Boxes.from_lists([[[2, 3, 14, 20], [5, 5, 30, 30]], [[0, 0, 4, 4]], None], labels=[[1, 0], [2], None])
    x, target = images()[:3], torch.tensor([1, 0, 2])
    guide = dk.Guide(model)
    loss = guide(x, target, labelled).loss
    maps = guide.attribute(x, target)
    same = dk.Boxes.from_lists([[[2, 3, 14, 20]], [], None])
    torch.testing.assert_close(loss, dk.energy_loss(maps, same, size=(32, 32)))
    only = guide(x, torch.tensor([1, -1, 2]), labelled).loss
    torch.testing.assert_close(only, dk.energy_loss(maps[:1], same[:1], size=(32, 32)))
    nothing = guide(x, torch.tensor([-1, -1, 2]), labelled).loss
    assert nothing == 0
    nothing.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_sums_and_weights_scale_the_loss():
    model = net().eval()
    mean = dk.Guide(model, weight=1.0)(images(), TARGET, BOXES).loss
    torch.testing.assert_close(dk.Guide(model, weight=0.25, reduction="sum")(images(), TARGET, BOXES).loss, 0.75 * mean)


def test_several_classes_are_explained_at_once():
    guide = dk.Guide(net().eval(), "body.relu1")
    several = torch.stack([TARGET, (TARGET + 1) % 3], 1)
    maps = guide.attribute(images(), several)
    assert maps.shape == (4, 2, 32, 32)
    torch.testing.assert_close(maps[:, 1], guide.attribute(images(), several[:, 1]))
    assert not maps.requires_grad


@pytest.mark.parametrize("method", ("integrated_gradients", "bcos"))
def test_running_the_model_again_moves_no_statistics(method):
    bcos = pytest.importorskip("bcos.modules") if method == "bcos" else None
    plain, guided = net().train(), net().train()
    for model in (plain, guided):
        if bcos:
            torch.manual_seed(2)
            model.body.conv2 = bcos.BcosConv2d(6, 8, 3, stride=2, padding=1).double()
    plain(images())
    dk.Guide(guided, "body.relu1", method, steps=2)(images(), TARGET, BOXES)
    for (name, expected), (_, buffer) in zip(plain.named_buffers(), guided.named_buffers()):
        assert torch.equal(buffer, expected), name
    assert all(m.track_running_stats for m in guided.modules() if isinstance(m, nn.BatchNorm2d))


def test_bcos_contributions_are_complete_and_can_be_trained_through():
    bcos = pytest.importorskip("bcos.modules")
    torch.manual_seed(0)
    body = [bcos.BcosConv2d(3, 6, 3, padding=1), bcos.BcosConv2d(6, 4, 3, stride=2, padding=1)]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    for layer in ("Input", "0", "1"):
        guide = dk.Guide(model, layer, "bcos", weight=2.0)
        logits, loss, maps = guide(images(), TARGET, BOXES)
        # In explanation mode the model is linear in its input: contributions add up to the logit.
        torch.testing.assert_close(maps.sum((1, 2)), logits.gather(1, TARGET[:, None])[:, 0])
        with explanation_mode(model):
            x = images().requires_grad_()
            feature = model[: {"Input": 0, "0": 1, "1": 2}[layer]](x)
            out = model[{"Input": 0, "0": 1, "1": 2}[layer] :](feature)
            expected = input_x_gradient(out, feature, TARGET, create_graph=True)
            torch.testing.assert_close(maps, expected)
            wanted = torch.autograd.grad(2 * dk.energy_loss(expected, BOXES, size=(32, 32)), list(model.parameters()))
        found = torch.autograd.grad(loss, list(model.parameters()))
        for ours, theirs in zip(found, wanted):
            torch.testing.assert_close(ours, theirs)
            assert ours.any()
        assert guide.closed_form is False


def test_frozen_layers_below_the_guided_one_stay_frozen():
    model = net().eval()
    model.body[:6].requires_grad_(False)
    _, loss, _ = dk.Guide(model, "body.relu2")(images(), TARGET, BOXES)
    loss.backward()
    assert model.body.conv1.weight.grad is None
    assert model.body.conv3.weight.grad.any()


@pytest.mark.parametrize("layer", ("Input", "Mid3", "Final"))
def test_bfloat16_autocast_gives_the_gradients_of_float32_roughly(layer):
    model = torchvision.models.resnet18(num_classes=3).eval()
    gradients = []
    for enabled in (False, True):
        guide = dk.Guide(model, layer)
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logits, loss, _ = guide(images(64).float(), TARGET, BOXES)
                (loss + nn.functional.cross_entropy(logits, TARGET)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert guide.closed_form == (layer == "Final")
    assert torch.isfinite(gradients[1]).all()
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.97


def test_a_guided_model_still_copies_and_saves(tmp_path):
    model = net()
    guide = dk.Guide(model)
    guide(images(), TARGET, BOXES)[1].backward()
    torch.save(copy.deepcopy(model), tmp_path / "model.pt")
    assert not any(module._forward_hooks for module in model.modules())


def test_models_that_are_trained_need_no_graph_when_evaluated():
    guide = dk.Guide(net().eval())
    with torch.no_grad():
        logits, loss, maps = guide(images(), TARGET, BOXES)
    assert not (logits.requires_grad or loss.requires_grad or maps.requires_grad)
    assert math.isfinite(loss)


class Twice(SmallNet):
    def forward_head(self, feature, pre_logits=False):
        self.body.relu1(feature)
        return super().forward_head(feature, pre_logits)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: dk.Guide("resnet"), TypeError, "model must be a torch.nn.Module"),
        (lambda m: dk.Guide(m, "body.relu9"), ValueError, "layer must name a module.*body.relu.*or one of Input, Mid1"),
        (lambda m: dk.Guide(m, 3), TypeError, "layer must be a module name"),
        (lambda m: dk.Guide(m, attribution="gradcam"), ValueError, "attribution must be one of"),
        (lambda m: dk.Guide(m, attribution="bcos"), ValueError, "model must hold B-cos layers"),
        (lambda m: dk.Guide(m, loss="mse"), ValueError, "loss must be one of"),
        (lambda m: dk.Guide(m, weight=-1.0), ValueError, "weight must be"),
        (lambda m: dk.Guide(m, reduction="none"), ValueError, "reduction must be one of"),
        (lambda m: dk.Guide(m, steps=0), ValueError, "steps must be"),
        (lambda m: dk.Guide(m, "Mid1")(images(), TARGET, BOXES), ValueError, "layer 'Mid1' is not known.*stages"),
        (lambda m: dk.Guide(m, "body.fc"), ValueError, "layer must name a module"),
        (lambda m: dk.Guide(m, "fc")(images(), TARGET, BOXES), ValueError, "must give a feature map"),
        (lambda m: dk.Guide(m)(images()[0], TARGET, BOXES), ValueError, r"images must have shape \[N,3,H,W\]"),
        (lambda m: dk.Guide(m)(images()[:0], TARGET[:0], BOXES[:0]), ValueError, "images must hold at least one"),
        (lambda m: dk.Guide(m)(images(), TARGET, BOXES[:3]), ValueError, r"boxes must be of N=4 images"),
        (lambda m: dk.Guide(m)(images(), TARGET, BOXES.coords), TypeError, "boxes must be a dk.Boxes"),
        (lambda m: dk.Guide(m)(images(), TARGET[:3], BOXES), ValueError, "target must have shape"),
        (lambda m: dk.Guide(m)(images(), TARGET + 9, BOXES), ValueError, r"target must lie in \[0,K\)"),
        (lambda m: dk.Guide(nn.Sequential(m, nn.Unflatten(1, (3, 1))))(images(), TARGET, BOXES), ValueError, "logits"),
        (
            lambda m: dk.Guide(nn.Sequential(*m.body), "8")(images(), TARGET, BOXES),
            ValueError,
            "model must give logits",
        ),
        (lambda m: dk.Guide(Twice((4,), (2,), 3).double(), "body.relu1")(images(), TARGET, BOXES), ValueError, "once"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(net())


@pytest.mark.parametrize("layer", ("Input", "body.relu2", "Final"))
@pytest.mark.parametrize("attribution", ("input_x_gradient", "grad_cam", "integrated_gradients"))
def test_gradients_that_float16_does_not_hold_still_make_maps(layer, attribution):
    model = net().float().eval()
    with torch.no_grad():
        model.fc.weight /= 1 << 16
    maps = []
    for enabled in (False, True):
        guide = dk.Guide(model, layer, attribution, steps=4)
        guide.use_gradients()
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            maps.append(guide.attribute(images().float(), TARGET).float().flatten())
    assert nn.functional.cosine_similarity(*maps, dim=0) > 0.99
    torch.testing.assert_close(maps[1].norm(), maps[0].norm(), rtol=0.03, atol=0)


@pytest.mark.parametrize("layer", ("Input", "body.relu2", "Final"))
def test_float16_autocast_with_a_loss_scaler_gives_the_gradients_of_float32_roughly(layer):
    model, gradients = net().float().eval(), []
    for enabled in (False, True):
        guide = dk.Guide(model, layer)
        guide.use_gradients()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            logits, loss, _ = guide(images().float(), TARGET, BOXES)
            total = loss + nn.functional.cross_entropy(logits, TARGET)
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.isfinite(gradients[1]).all()
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.99
    torch.testing.assert_close(gradients[1].norm(), gradients[0].norm(), rtol=0.03, atol=0)
