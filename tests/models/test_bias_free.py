"""X-DNNs: homogeneous, and therefore explained exactly by one gradient."""

import pytest
import timm
import torch
import torchvision
from cases import normal
from torch import nn

import debiaskd as dk
from debiaskd.attribution import input_x_gradient, integrated_gradients
from debiaskd.models import SmallNet
from debiaskd.models.zoo.bias_free import BiasFreeBatchNorm2d, bias_free

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET = torch.tensor([2, 0])


def images(size=32):
    return normal(2, 3, size, size, dtype=torch.float64)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SmallNet((6, 8), (2, 2), 3),
        lambda: torchvision.models.resnet18(num_classes=3),
        lambda: torchvision.models.vgg11_bn(num_classes=3).features.append(nn.Flatten()),
    ],
    ids=("SmallNet", "resnet18", "vgg"),
)
def test_input_x_gradient_equals_integrated_gradients_and_adds_up(make):
    torch.manual_seed(0)
    model = make().double()
    model.train()(images())  # statistics that are not those of a new model
    model = bias_free(model.eval(), images())
    x = images().requires_grad_()
    logits = model(x)
    maps = input_x_gradient(logits, x, TARGET)
    torch.testing.assert_close(maps.sum((1, 2)), logits.gather(1, TARGET[:, None])[:, 0])
    torch.testing.assert_close(maps, integrated_gradients(model, images(), TARGET, steps=3))
    assert not any("bias" in name for name, _ in model.named_parameters())


def test_a_biased_model_does_not_have_that():
    torch.manual_seed(0)
    model = SmallNet((6, 8), (2, 2), 3).double()
    model.train()(images())
    x = images().requires_grad_()
    maps = input_x_gradient(model.eval()(x), x, TARGET)
    assert (maps - integrated_gradients(model, images(), TARGET, steps=3)).abs().max() > 0.01 * maps.abs().max()


def test_it_trains_and_is_guided():
    model = bias_free(SmallNet((6, 8), (2, 2), 3), normal(2, 3, 16, 16)).train()
    square = model.body.bn1.running_square.clone()
    logits, loss, _ = dk.Guide(model, "Input")(normal(2, 3, 16, 16), TARGET, dk.Boxes.from_lists([[[0, 0, 5, 9]], []]))
    (loss + nn.functional.cross_entropy(logits, TARGET)).backward()
    assert all(p.grad.any() for p in model.parameters())
    assert not torch.equal(model.body.bn1.running_square, square)


def test_the_norm_is_root_mean_square_in_training_and_a_fixed_scale_in_evaluation():
    norm = BiasFreeBatchNorm2d(4, momentum=0.25)
    norm.weight.data = torch.tensor([1.0, 2.0, 3.0, 0.5])
    x = 3 * normal(5, 4, 6, 7) + 1
    out = norm(x)
    torch.testing.assert_close(out.square().mean((0, 2, 3)).sqrt(), norm.weight.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(norm.running_square, 0.75 + 0.25 * x.square().mean((0, 2, 3)))
    norm.eval()
    torch.testing.assert_close(norm(7 * x), 7 * norm(x))
    plain = nn.BatchNorm2d(4).eval()
    plain.running_mean.uniform_()
    torch.testing.assert_close(BiasFreeBatchNorm2d.like(plain).running_square, 1 + plain.running_mean.square())


def test_models_that_cannot_be_homogeneous_are_refused_untouched():
    model = timm.create_model("convnext_atto", num_classes=3)
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"model must be positively homogeneous without its biases, got .*GELU"):
        bias_free(model, normal(1, 3, 32, 32))
    assert dict(model.named_parameters()).keys() == before.keys()
    with pytest.raises(ValueError, match=r"model must use torch.nn.BatchNorm2d itself, got BatchNormAct2d"):
        bias_free(timm.create_model("efficientnet_b0"), normal(1, 3, 32, 32))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        bias_free("resnet18", images())
    with pytest.raises(TypeError, match="example must be"):
        bias_free(nn.Linear(1, 1), None)
