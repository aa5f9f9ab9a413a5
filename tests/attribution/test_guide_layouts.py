"""Guides of networks with channels last, of images that are not square, and as recipes ask for them."""

import pytest
import torch
from cases import normal
from torch import nn

import debiaskd as dk
from debiaskd.attribution import integrated_gradients
from debiaskd.models import SmallNet
from debiaskd.terms import GuideOptions, make_guide
from debiaskd.terms.backdoor import Intervened, Intervention

pytestmark = pytest.mark.usefixtures("one_thread")
TARGET, K = torch.tensor([1, 0, 2, 2]), 3


class ChannelsLast(nn.Module):
    """Its last map is [N,H,W,C], and no linear function of it is a logit."""

    def __init__(self):
        super().__init__()
        self.conv, self.last, self.fc = nn.Conv2d(3, 6, 3, 4, 1), nn.Identity(), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.last(self.conv(x).permute(0, 2, 3, 1)).sin().mean((1, 2)))


@pytest.mark.parametrize("method", ("input_x_gradient", "grad_cam"))
def test_maps_of_layers_with_channels_last_and_pictures_that_are_not_square(method):
    torch.manual_seed(1)
    model, x = ChannelsLast().double(), normal(4, 3, 24, 48, dtype=torch.float64)
    boxes = dk.Boxes.from_lists([[[30, 3, 48, 20]], None, [], [[0, 0, 9, 9], [20, 12, 32, 24]]])
    guide = dk.Guide(model, "last", method)
    _, loss, maps = guide(x, TARGET, boxes)
    assert guide.closed_form is False and maps.shape == (4, 6, 12)
    feature = model.conv(x).detach().requires_grad_()
    chosen = model.fc(feature.sin().mean((2, 3))).gather(1, TARGET[:, None]).sum()
    (gradient,) = torch.autograd.grad(chosen, feature)
    if method == "grad_cam":
        expected = (gradient.mean((2, 3), keepdim=True) * feature).sum(1).relu()
        assert bool((expected == 0).any()) and bool((expected > 0).any())
    else:
        expected = (gradient * feature).sum(1)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(loss, dk.energy_loss(expected, boxes, size=(24, 48)))


def test_integrated_gradients_take_as_many_steps_as_are_asked_for():
    torch.manual_seed(1)
    model, x = ChannelsLast().double(), normal(4, 3, 24, 48, dtype=torch.float64)
    feature = model.conv(x).detach()

    def head(given):
        return model.fc(given.sin().mean((2, 3)))

    for steps in (1, 3):
        expected = integrated_gradients(head, feature, TARGET, steps=steps)
        found = dk.Guide(model, "last", "integrated_gradients", steps=steps).attribute(x, TARGET)
        torch.testing.assert_close(found, expected)


class Tokens(ChannelsLast):
    """Its last features are tokens, the first of which is no part of the map and has a say in every other."""

    num_prefix_tokens = 1

    def forward(self, x):
        grid = self.conv(x).flatten(2).transpose(1, 2)
        tokens = self.last(torch.cat([grid.amax(1, keepdim=True), grid], 1))
        return self.fc((tokens[:, 1:] * tokens[:, :1]).sin().mean(1))


def test_integrated_gradients_leave_tokens_alone_that_are_no_part_of_the_map():
    torch.manual_seed(1)
    model, x = Tokens().double(), normal(4, 3, 32, 32, dtype=torch.float64)
    feature = model.conv(x).detach()
    first = feature.flatten(2).amax(2)[:, :, None, None]

    def head(given):
        return model.fc((given * first).sin().mean((2, 3)))

    found = dk.Guide(model, "last", "integrated_gradients", steps=4).attribute(x, TARGET)
    torch.testing.assert_close(found, integrated_gradients(head, feature, TARGET, steps=4))


def test_float16_does_not_make_other_maps_of_layers_with_channels_last():
    torch.manual_seed(1)
    model, x = ChannelsLast(), normal(4, 3, 24, 48, dtype=torch.float32)
    maps = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            maps.append(dk.Guide(model, "last").attribute(x, TARGET).float())
    torch.testing.assert_close(maps[1], maps[0], rtol=0.02, atol=0.02 * float(maps[0].abs().max()))


def test_guides_are_made_as_they_are_asked_for() -> None:
    plain, explained = SmallNet((4, 6), (1, 2), K), Explained()
    assert make_guide(GuideOptions(), plain).attribution == "input_x_gradient"
    assert make_guide(GuideOptions(), explained).attribution == "bcos"
    assert make_guide(GuideOptions(attribution="grad_cam"), explained).attribution == "grad_cam"
    assert make_guide(GuideOptions(attribution="integrated_gradients", steps=5), plain).steps == 5
    assert make_guide(GuideOptions(attribution="integrated_gradients"), plain).steps == 32
    found = Intervened(plain, Intervention(6, K, "nwgm", 4.0)).eval()
    images = torch.randn(2, 3, 16, 16)
    named, final = (make_guide(GuideOptions(layer=layer), found) for layer in ("body.conv1", "Final"))
    assert named.attribute(images, TARGET[:2]).shape == (2, 16, 16)
    assert final.attribute(images, TARGET[:2]).shape == (2, 8, 8)


class Explained(SmallNet):
    """Has the switch that networks of B-cos layers have."""

    def __init__(self) -> None:
        super().__init__((4, 6), (1, 2), K)

    def set_explanation_mode(self, on: bool = True) -> None:
        pass


class Paired(nn.Module):
    """Gives a tuple, as blocks with class tokens do."""

    def forward(self, x):
        return x, x.mean((2, 3))


def test_a_map_of_one_position_is_refused():
    model = SmallNet((4, 4), (4, 8), 3)
    boxes = dk.Boxes.from_lists([[[0, 0, 9, 9]]] * 4)
    with pytest.raises(ValueError, match=r"got 'Final', whose map is 1×1 for images of 32×32"):
        dk.Guide(model)(normal(4, 3, 32, 32), TARGET, boxes)
    dk.Guide(model, loss="rrr")(normal(4, 3, 32, 32), TARGET, boxes)  # which counts the map itself


def test_a_layer_that_gives_a_tuple_is_named_as_such():
    model = SmallNet((4, 4), (2, 2), 3)
    model.pair = Paired()
    model.body.register_forward_hook(lambda module, arguments, output: model.pair(output)[0])
    with pytest.raises(ValueError, match="'pair' must run in a forward pass and give one tensor, got a module"):
        dk.Guide(model, "pair").attribute(normal(4, 3, 32, 32), TARGET)
