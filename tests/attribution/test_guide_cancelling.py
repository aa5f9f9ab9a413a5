"""A norm of each position undoes its scale: input × gradient in front of it is 0 whatever is there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import debiaskd as dk

timm = pytest.importorskip("timm")
IMAGES, TARGET = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 32} if "vit" in name else {}
    model: nn.Module = timm.create_model(name, num_classes=3, **size).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-12  # as if activations were as large as after training
    return model


def share_left(model: nn.Module, name: str) -> float:
    """Σ |Σ_c G·A| / Σ |G·A| at a module's output: what does not cancel within a position."""
    caught: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, output: caught.append(output))
    logits = model(IMAGES)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[torch.arange(2), TARGET].sum(), caught)
    parts = (gradient * caught[0]).detach().double()
    if parts.dim() == 3:  # without the class token
        parts = parts[:, 1:].transpose(1, 2)
    return float(parts.sum(1).abs().sum() / parts.abs().sum())


@pytest.mark.parametrize(
    "name, layer, before, behind",
    [
        ("test_vit", "Final", "blocks.4", "blocks.5.norm1"),
        ("test_convnext", "Mid3", "stages.2", "stages.3.downsample.0"),
        ("test_convnext", "Mid1", "stages.0", "stages.1.downsample.0"),
    ],
)
@pytest.mark.parametrize("attribution", ["input_x_gradient", "integrated_gradients"])
def test_a_depth_in_front_of_such_a_norm_is_what_the_norm_gives(
    name: str, layer: str, before: str, behind: str, attribution: str
) -> None:
    model = network(name)
    assert share_left(model, before) < 1e-5 < 1e-3 < share_left(model, behind)
    guide = dk.Guide(model, layer, attribution, steps=2)
    maps = guide.attribute(IMAGES, TARGET)
    assert guide.state_dict()["depth"][0] == behind
    expected = dk.Guide(model.double(), behind, attribution, steps=2).attribute(IMAGES.double(), TARGET)
    torch.testing.assert_close(maps.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_grad_cam_stays_where_it_was() -> None:
    guide = dk.Guide(network("test_convnext"), "Mid3", "grad_cam")
    guide.attribute(IMAGES, TARGET)
    assert guide.state_dict()["depth"][0] == "stages.2"


def test_a_layer_that_is_named_is_refused_with_the_norm() -> None:
    guide = dk.Guide(network("test_convnext"), "stages.2")
    with pytest.raises(ValueError, match=r"'stages\.2'.*name what the norm gives, 'stages\.3\.downsample\.0'"):
        guide.attribute(IMAGES, TARGET)
    dk.Guide(network("test_convnext"), "stages.2", "grad_cam").attribute(IMAGES, TARGET)


def test_a_layer_whose_scale_counts_is_taken_as_it_is() -> None:
    larger = IMAGES.repeat(1, 1, 2, 2)  # a map of one position is one that its norm reads alone
    for name, layer, expected in [("test_convnext", "Final", "norm_pre"), ("test_vit", "Mid1", "blocks.1")]:
        guide = dk.Guide(network(name), layer)
        guide.attribute(IMAGES if name == "test_vit" else larger, TARGET)
        assert guide.state_dict()["depth"][0] == expected


def test_a_map_of_one_position_is_attributed() -> None:
    assert dk.Guide(network("test_convnext")).attribute(IMAGES, TARGET).shape == (2, 1, 1)
