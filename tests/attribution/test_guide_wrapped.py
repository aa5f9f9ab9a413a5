"""Guided models inside of what wraps them: DistributedDataParallel, Lightning Fabric, torch.compile, inference mode."""

import guided_ranks
import processes
import pytest
import torch
from torch import nn

import debiaskd as dk
from debiaskd.models import SmallNet

pytestmark = pytest.mark.usefixtures("one_thread")
needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


@needs_gloo
@pytest.mark.xdist_group("processes")
def test_ranks_end_with_the_gradients_of_the_whole_batch(tmp_path):
    """With static_graph, where an attribution's gradient was taken for the step's; and through SyncBatchNorm."""
    processes.spawn(guided_ranks.run, str(tmp_path), ranks=guided_ranks.RANKS)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(guided_ranks.RANKS)]
    for task, layer in guided_ranks.TASKS:
        model = guided_ranks.make(task)
        guided_ranks.steps(model, layer, *guided_ranks.batch())
        expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        assert all(gradient.any() for gradient in expected[-2:])
        for norms, gradients, buffers in (rank[task, layer] for rank in ranks):
            if task == "static":
                assert norms == pytest.approx([norms[0]] * 3)
            for found, wanted in zip(gradients, expected):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
            for name, value in model.named_buffers():
                torch.testing.assert_close(buffers[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", ("Input", "body.relu1", "Final"))
@pytest.mark.parametrize("precision", ("32-true", "bf16-mixed", "bf16-true"))
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_fabric_has_set_up_is_guided(precision, layer):
    fabric_module = pytest.importorskip("lightning_fabric")
    images, labels, boxes = guided_ranks.batch()
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = SmallNet((4, 6), (1, 2), 4).train()
        fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision=precision)
        made = fabric.setup(model) if wrapped else model
        guide = dk.Guide(made, layer)
        for _ in range(2):
            made.zero_grad()
            logits, loss, _ = guide(images, labels, boxes)
            total = loss + nn.functional.cross_entropy(logits, labels)
            fabric.backward(total) if wrapped else total.backward()
        gradients.append(torch.cat([p.grad.flatten().float() for p in model.parameters()]))
        assert guide.closed_form is (layer == "Final")
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.97
    if precision == "32-true":
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("attribution", ("input_x_gradient", "integrated_gradients"))
@pytest.mark.parametrize("layer", ("Input", "body.relu1", "Final"))
def test_maps_inside_of_inference_mode_are_those_outside(layer, attribution):
    model = SmallNet((4, 6), (1, 2), 4).eval()
    images, labels, boxes = guided_ranks.batch()
    expected = dk.Guide(model, layer, attribution, steps=2)(images, labels, boxes)
    guide = dk.Guide(model, layer, attribution, steps=2)
    with torch.inference_mode():
        images, labels = images + 0, labels + 0
        for _ in range(2):
            torch.testing.assert_close(guide.attribute(images, labels), expected.attribution.detach())
            step = guide(images, labels, boxes)
            torch.testing.assert_close(step.loss, expected.loss.detach())
            assert not step.loss.requires_grad
    torch.testing.assert_close(guide.attribute(images, labels), expected.attribution.detach())


def test_a_model_made_in_inference_mode_is_refused():
    images, labels, _ = guided_ranks.batch()
    with torch.inference_mode():
        guide = dk.Guide(SmallNet((4, 6), (1, 2), 4).eval(), "Input")
        with pytest.raises(ValueError, match=r"model must be made outside of torch\.inference_mode"):
            guide.attribute(images, labels)


@pytest.mark.parametrize("layer", ("Input", "body.relu1", "Final"))
def test_a_compiled_model_is_guided_as_the_model_itself(layer):
    """It runs as it is while it is guided, so nothing is compiled here."""
    model = SmallNet((4, 6), (1, 2), 4)
    images, labels, boxes = guided_ranks.batch()
    results = []
    for made in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        guide = dk.Guide(made, layer)
        for _ in range(2):
            _, loss, maps = guide(images, labels, boxes)
        loss.backward()
        results.append((maps, *(p.grad for p in model.parameters())))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)
