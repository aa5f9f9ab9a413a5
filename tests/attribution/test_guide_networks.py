"""Networks that have no map, no second derivative or no fresh graph where one would look for it."""

import pytest
import timm
import torch
from cases import normal
from timm import models
from torch import nn

import debiaskd as dk
from debiaskd.attribution import input_x_gradient
from debiaskd.models import depths

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET, BOXES = torch.tensor([1, 2]), dk.Boxes.from_lists([[[2, 3, 14, 20]], [[9, 9, 30, 32]]])


def images(size=32):
    return normal(2, 3, size, size)


def _vit(**options):
    return models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=3, **options
    )


def _pit():
    return models.pit.PoolingVisionTransformer(
        img_size=32, patch_size=8, stride=4, stem_type="overlap", base_dims=(8, 8), depth=(2, 3), heads=(2, 4),
        mlp_ratio=2, num_classes=3,
    )  # fmt: skip


def _levit():
    return models.levit.Levit(
        img_size=64, embed_dim=(16, 24, 32), key_dim=8, depth=(1, 1, 1), num_heads=(2, 2, 2), num_classes=3
    )


#: (network, the layer that Final is, the side of its map)
CLASS_TOKENS = {
    "vit": (_vit, "blocks.2", 4),
    "vit with registers": (lambda: _vit(reg_tokens=4), "blocks.2", 4),
    "vit of one block": (
        lambda: models.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=3),
        "blocks.0.norm1",
        4,
    ),
    "vit averaged": (lambda: _vit(global_pool="avg"), "norm", 4),
    "deit": (
        lambda: models.deit.VisionTransformerDistilled(
            img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=3
        ),
        "blocks.1",
        4,
    ),
    "cait": (
        lambda: models.Cait(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3),
        "blocks.1",
        4,
    ),
    "xcit": (
        lambda: models.Xcit(
            img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3, cls_attn_layers=1
        ),
        "blocks.1",
        4,
    ),
    "pit": (_pit, "transformers.1.blocks.1", 4),
}


@pytest.mark.parametrize("name", CLASS_TOKENS)
def test_final_is_the_last_layer_whose_patch_tokens_reach_the_logits(name):
    torch.manual_seed(0)
    make, layer, side = CLASS_TOKENS[name]
    model = make().eval()
    assert depths.find(model, "Final", images(), reaching=True).module == layer
    for zeroed in (False, True):
        if zeroed:  # which changes nothing about where the tokens go
            for module in model.modules():
                if isinstance(module, nn.Linear) and module.out_features == 3:
                    nn.init.zeros_(module.weight)
            assert depths.find(model, "Final", images(), reaching=True).module == layer
            continue
        for depth in ("Mid3", "Final"):
            guide = dk.Guide(model, depth)
            _, loss, maps = guide(images(), TARGET, BOXES)
            assert maps.shape[0] == 2 and bool(maps.any())
            loss.backward()
            assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
        assert maps.shape[1:] == (side, side)


def test_a_map_that_the_logits_ignore_is_refused_by_name():
    for layer in ("norm", "blocks.3"):
        with pytest.raises(
            ValueError, match=rf"layer '{layer}' must give a map that the logits depend on.*'blocks\.2'"
        ):
            dk.Guide(_vit().eval(), layer)(images(), TARGET, BOXES)


def test_maps_of_tokens_are_gradients_of_the_patches_alone():
    torch.manual_seed(0)
    model = _vit().eval()
    caught = []
    model.blocks[3].norm1.register_forward_hook(lambda module, arguments, output: caught.append(output))
    logits = model(images())
    (gradient,) = torch.autograd.grad(logits.gather(1, TARGET[:, None]).sum(), caught[0])
    expected = (gradient * caught[0]).sum(2)[:, 1:].reshape(2, 4, 4)
    torch.testing.assert_close(dk.Guide(model).attribute(images(), TARGET), expected.detach())


@pytest.mark.parametrize("name", ("mobilenetv3_small_050", "lcnet_035"))
def test_hard_sigmoids_can_be_trained_through(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).train()
    for layer in ("Mid1", "Mid3"):
        model.zero_grad()
        dk.Guide(model, layer)(images(64), TARGET, BOXES).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("activation", (nn.Hardsigmoid(), nn.Hardsigmoid(inplace=True), nn.Hardswish(), nn.Hardtanh()))
def test_second_derivatives_of_hard_activations(activation):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, 4, 1), nn.Tanh(), nn.Conv2d(6, 6, 1), activation]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).double()
    guide, x = dk.Guide(model, "1"), images().double() * 3
    _, loss, maps = guide(x, TARGET, BOXES)
    feature = model[:2](x).detach().requires_grad_()
    torch.testing.assert_close(maps.detach(), input_x_gradient(model[2:](feature), feature, TARGET))
    loss.backward()
    weight, direction = model[2].weight, normal(6, 6, 1, 1, dtype=torch.float64)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-6 * direction
            values.append(guide(x, TARGET, BOXES).loss)
            weight -= sign * 1e-6 * direction
    numeric = (values[0] - values[1]) / 2e-6
    assert numeric != 0
    torch.testing.assert_close((weight.grad * direction).sum(), numeric, rtol=1e-5, atol=1e-8)


CACHING = {
    "levit": _levit,
    "tiny_vit": lambda: models.TinyVit(
        embed_dims=(8, 16, 16, 24), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), window_sizes=(2,) * 4, num_classes=3
    ),
    "efficientvit_msra": lambda: models.EfficientVitMsra(
        img_size=128, embed_dim=(16, 16, 16), key_dim=(4, 4, 4), depth=(1, 1, 1), num_heads=(2, 2, 2), num_classes=3,
        window_size=(4, 4, 4), kernels=(3, 3, 3, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHING)
def test_attention_biases_that_were_cached_are_not_used_again(name):
    torch.manual_seed(0)
    model, x = CACHING[name]().eval(), images(128 if name == "efficientvit_msra" else 64)  # maps of several positions
    for parameter in model.parameters():  # branches that begin at zero
        if not parameter.any():
            nn.init.normal_(parameter)
    biases = [p for n, p in model.named_parameters() if n.endswith("attention_biases")]
    model(x)  # with gradients: their graph is in the cache now
    for layer in ("Final", "Input"):
        guide = dk.Guide(model, layer)
        first = guide.attribute(x, TARGET)
        with torch.inference_mode():
            model(x)
        guide.use_gradients()
        for _ in range(2):
            step = guide(x, TARGET, BOXES)
            step.loss.backward()
        torch.testing.assert_close(step.attribution.detach(), first)
    assert biases and any(bool(bias.grad.any()) for bias in biases)
    with torch.no_grad():
        for bias in biases:
            bias.normal_(std=3)
    assert not torch.allclose(guide.attribute(x, TARGET), first, atol=0)
