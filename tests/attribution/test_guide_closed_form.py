"""The closed form is taken where the network's structure allows for it, whatever the weights happen to be."""

import copy

import pytest
import timm
import torch
from cases import normal
from torch import nn

import debiaskd as dk
from debiaskd.attribution import final_layer_map, input_x_gradient
from debiaskd.models import SmallNet
from debiaskd.terms import GuideOptions
from debiaskd.terms.guidance import GuideTerm, make_guide
from debiaskd.training.feature_extraction import FeatureExtractor
from debiaskd.training.learner import Learner
from debiaskd.training.schedule import Ema

pytestmark = pytest.mark.usefixtures("one_thread")
BOXES = dk.Boxes.from_lists([[[2, 3, 14, 20]], None, [], [[0, 0, 9, 9], [20, 20, 32, 32]]])
TARGET = torch.tensor([1, 0, 2, 2])


def net():
    torch.manual_seed(1)
    return SmallNet((6, 8, 8), (1, 2, 2), 3).double()


def images(side=32):
    return normal(4, 3, side, side, dtype=torch.float64)


def decided(model, layer="Final", side=32):
    guide = dk.Guide(model, layer)
    guide(images(side).to(next(model.parameters())), TARGET, BOXES)
    return guide.closed_form


def zero(layer):
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def test_a_head_of_zeros_has_the_closed_form_and_keeps_it_when_it_is_trained():
    model = net()
    zero(model.fc)
    guide = dk.Guide(model)
    guide(images(), TARGET, BOXES)
    assert guide.closed_form
    nn.init.normal_(model.fc.weight)
    maps = guide.attribute(images(), TARGET)
    assert maps.any()
    torch.testing.assert_close(maps, final_layer_map(model.body(images()), model.fc.weight, TARGET).detach())


def test_maps_of_zeros_do_not_decide():
    model = net().eval()
    model.body.bn3.bias.data.fill_(-1e6)
    assert decided(model)


class Headed(nn.Module):
    """A body, pooling, whatever comes next, and a linear layer."""

    def __init__(self, between, last=None):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 4, 1), nn.Tanh())
        self.pool, self.between = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), between
        self.last = last or nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.between(self.pool(self.body(x))))


class Squeezed(nn.Module):
    def forward(self, x):
        return x[:, :, None].squeeze(2).contiguous().view(-1, 6)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (nn.Identity(), True),
        (Squeezed(), True),
        (nn.Dropout(0.0), True),
        (nn.Dropout(0.5), False),
        (nn.BatchNorm1d(6), False),
        (nn.LayerNorm(6), False),
        (nn.ReLU(), False),
        (nn.Linear(6, 6, bias=False), False),
    ],
)
@pytest.mark.parametrize("head", ("trained", "zero"))
def test_only_pooling_may_lie_before_the_last_layer(between, expected, head):
    """A head of zeros, or a norm that is the identity, has the same values."""
    model = Headed(copy.deepcopy(between)).double()
    if isinstance(between, nn.BatchNorm1d):
        model.between.eps = 0.0
    if isinstance(between, nn.Linear):
        nn.init.eye_(model.between.weight)
    if head == "zero":
        zero(model.last)
    assert decided(model, "body") is expected
    guide = dk.Guide(model, "body")
    nn.init.normal_(model.last.weight)
    model.eval()
    feature = model.body(images())
    logits = model.last(model.between(model.pool(feature)))
    torch.testing.assert_close(guide.attribute(images(), TARGET), input_x_gradient(logits, feature, TARGET))


def test_a_norm_that_is_the_identity_when_it_is_first_seen_is_none():
    model = Headed(nn.BatchNorm1d(6)).double().eval()
    guide = dk.Guide(model, "body")
    guide(images(), TARGET, BOXES)
    assert guide.closed_form is False
    with torch.no_grad():
        model.between.running_var.uniform_(0.1, 3)
    feature = model.body(images())
    logits = model.last(model.between(model.pool(feature)))
    torch.testing.assert_close(guide.attribute(images(), TARGET), input_x_gradient(logits, feature, TARGET))


@pytest.mark.parametrize("last", (Doubled(6, 3), nn.Sequential(nn.Linear(6, 3), nn.Softplus())))
def test_what_the_last_layer_does_besides_is_noticed(last):
    assert decided(Headed(nn.Identity(), last).double(), "body") is False


def test_a_residual_branch_of_zeros_does_not_make_an_earlier_map_the_last():
    torch.manual_seed(0)
    blocks = timm.models.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 2], num_classes=3).eval()
    with torch.no_grad():
        blocks.layer4[1].bn2.weight.zero_()
        blocks.layer4[1].bn2.bias.zero_()
    assert decided(blocks, "layer4.0", 64) is False
    assert decided(blocks, side=64) is True


def test_pooling_that_weighs_positions_is_noticed():
    model = Headed(nn.Identity()).double()
    model.pool = nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert decided(model, "body") is False
    model.pool = nn.Sequential(nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert decided(model, "body") is True


def test_what_is_decided_goes_into_the_state_and_comes_back():
    model = net()
    guide = dk.Guide(model)
    assert guide.state_dict() == {"depth": None, "closed_form": {}}
    guide(images(), TARGET, BOXES)
    state = guide.state_dict()
    assert state == {"depth": ["body", "NCHW", 0, 1], "closed_form": {"training": "fc"}}
    again = dk.Guide(model)
    again.load_state_dict(state)
    assert again.closed_form and again.state_dict() == state
    gradients = dk.Guide(model)
    gradients.use_gradients()
    again.load_state_dict(gradients.state_dict())
    assert again.closed_form is False
    with pytest.raises(ValueError, match=r"state must be of this guide's model.*'head'"):
        again.load_state_dict({"depth": None, "closed_form": {"training": "head"}})


def test_the_decision_is_part_of_a_terms_state(tmp_path):
    model = net()
    term = GuideTerm(GuideOptions(), make_guide(GuideOptions(), model))
    term.guide(images(), TARGET, BOXES)
    torch.save(nn.ModuleDict({"guide": term}).state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    again = GuideTerm(GuideOptions(), make_guide(GuideOptions(), model))
    nn.ModuleDict({"guide": again}).load_state_dict(loaded)
    assert again.guide.closed_form is True
    older = GuideTerm(GuideOptions(), make_guide(GuideOptions(), model))
    nn.ModuleDict({"guide": older}).load_state_dict({})
    assert older.guide.closed_form is None


def test_averaged_weights_leave_the_decision_alone():
    model = net().float()
    guide = make_guide(GuideOptions(), model)
    learner = Learner(FeatureExtractor(model, None, ()), {"guide": GuideTerm(GuideOptions(), guide)}, guide=guide)
    guide(images().float(), TARGET, BOXES)
    ema = Ema(learner, 0.5)
    ema.update(learner, 1)
    ema.swap(learner)
    assert guide.closed_form is True
    assert all(isinstance(tensor, torch.Tensor) for tensor in ema.tensors.values())
