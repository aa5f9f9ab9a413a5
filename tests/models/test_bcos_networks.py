"""B-cos networks whose makers, called as they are, lack their layers: as their authors' configurations build them."""

import pytest
import torch

import debiaskd as dk
from debiaskd.models.registry import build

pytest.importorskip("bcos")
from bcos.models import pretrained

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", ("vgg11_bnu", "simple_vit_ti_patch16_224", "vitc_ti_patch1_14"))
def test_their_weights_fit(name):
    if "vit" in name:
        pytest.importorskip("einops")
    with torch.device("meta"):  # a VGG has half a gigabyte of weights
        model, expected = build(f"bcos/{name}", 3), getattr(pretrained, name)(pretrained=False, num_classes=3)
    found, wanted = model.state_dict(), expected.state_dict()
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in wanted.items()}
    kinds = [[type(module).__name__ for module in each.modules()] for each in (model, expected)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", ("simple_vit_ti_patch16_224", "vitc_ti_patch1_14"))
def test_their_explanations_are_complete_and_can_be_trained_through(name):
    pytest.importorskip("einops")
    torch.manual_seed(0)
    model, image = build(f"bcos/{name}", 3), torch.rand(1, 3, 32, 32)
    images, target = torch.cat([image, 1 - image], 1), torch.tensor([1])
    for layer in ("Input", "Final"):
        step = dk.Guide(model, layer, "bcos")(images, target, dk.Boxes.from_lists([[[2, 3, 20, 30]]]))
        if layer == "Final":  # what positions contribute, which are added below, is no part of the image's
            expected = step.logits[:, 1] - model[1].logit_bias
            torch.testing.assert_close(step.attribution.sum((1, 2)), expected, rtol=1e-3, atol=1e-4)
        step.loss.backward()
        assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_names_of_none_are_refused():
    for name in ("vgg12", "vitc_xl_patch1_14"):
        if "vit" in name:
            pytest.importorskip("einops")
        with pytest.raises(ValueError, match=f"bcos/{name}: the bcos package has no such network"):
            build(f"bcos/{name}", 3)
