"""What autograd, autocast and compilation may do with `channel_dot`."""

import pytest
import torch
from cases import every_way, lay_out, normal

import debiaskd as dk
from debiaskd.ops import backend

needs_native = pytest.mark.skipif(not backend.native, reason="the native libraries are not built")


@every_way("channel_dot")
@pytest.mark.parametrize(
    ("layout", "shape"),
    [("contiguous", (2, 3, 2, 2)), ("channels_last", (2, 3)), ("stepped", (2, 3, 2, 2)), ("contiguous", (2, 3))],
    ids=str,
)
def test_gradcheck_of_both_orders(way, layout, shape):
    feature = way.put(lay_out(normal(2, 3, 2, 2, dtype=torch.float64), layout)).requires_grad_()
    gradient = way.put(normal(*shape, seed=1, dtype=torch.float64)).requires_grad_()
    fast = way.name == "triton"  # interpreted, whose every call takes milliseconds
    with way.active():
        assert torch.autograd.gradcheck(dk.channel_dot, (gradient, feature), fast_mode=fast)
        assert torch.autograd.gradgradcheck(dk.channel_dot, (gradient, feature), fast_mode=fast)


def attribution_loss(model, head, images):
    """Input × gradient at the last map, squared: what guidance differentiates by the model's parameters."""
    feature = model(images)
    score = head(feature.mean((2, 3))).square().sum()  # not linear, so that its gradient depends on the feature
    (gradient,) = torch.autograd.grad(score, feature, create_graph=True)
    return dk.channel_dot(gradient, feature).square().sum()


@every_way("channel_dot")
def test_guidance_through_a_model_gives_the_gradients_of_plain_pytorch(way):
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 6, 3), torch.nn.Softplus()).double().to(way.device)
    head = torch.nn.Linear(6, 3).double().to(way.device)
    images, parameters = way.put(normal(2, 2, 6, 5, dtype=torch.float64)), [*model.parameters(), *head.parameters()]

    def gradients():
        loss = attribution_loss(model, head, images)
        return loss, *torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)

    with dk.backend("eager"):
        expected = gradients()
    with way.active():
        for actual, wanted in zip(gradients(), expected):
            torch.testing.assert_close(actual, wanted)


@every_way("channel_dot")
@pytest.mark.parametrize("who", (0, 1))
def test_only_what_asks_for_a_gradient_gets_one(way, who):
    for shape in ((2, 5, 3, 4), (2, 5)):
        inputs = [way.put(normal(*shape)), way.put(normal(2, 5, 3, 4, seed=1))]
        inputs[who].requires_grad_()
        with way.active():
            out = dk.channel_dot(*inputs)
            (first,) = torch.autograd.grad(out.sum(), inputs[who], retain_graph=True)
            out.sum().backward()
            assert torch.equal(inputs[who].grad, first)
            assert inputs[1 - who].grad is None
            with torch.no_grad():
                assert not dk.channel_dot(*inputs).requires_grad


@every_way("channel_dot")
def test_autocast_takes_whatever_dtypes_it_makes(way):
    feature, gradient = way.put(normal(2, 4, 3, 3, dtype=torch.bfloat16)), way.put(normal(2, 4, 3, 3))
    with way.active():
        with torch.autocast(way.device, dtype=torch.bfloat16):
            out = dk.channel_dot(gradient, feature)
        assert torch.equal(out, dk.channel_dot(gradient.bfloat16(), feature))
    assert out.dtype == torch.float32


@pytest.mark.compiles
@every_way("channel_dot")
@pytest.mark.parametrize(("shape", "layout"), [((2, 5, 3, 4), "contiguous"), ((2, 5), "channels_last")], ids=str)
def test_one_compiled_graph_equals_the_plain_call(way, shape, layout):
    gradient, feature = way.put(normal(*shape)), way.put(lay_out(normal(2, 5, 3, 4, seed=1), layout))
    torch.compiler.reset()

    def both(function):
        inputs = [x.detach().requires_grad_() for x in (gradient, feature)]
        out = function(*inputs)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    with way.active():
        compiled = torch.compile(
            lambda g, a: dk.channel_dot(g * 2, a) * 3, backend="aot_eager", fullgraph=True, dynamic=True
        )
        for actual, expected in zip(both(compiled), both(lambda g, a: dk.channel_dot(g * 2, a) * 3)):
            torch.testing.assert_close(actual, expected)


@needs_native
@pytest.mark.compiles
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("contiguous", torch.float32),
        ("channels_last", torch.bfloat16),
        ("stepped", torch.bfloat16),
        ("expanded", torch.float32),
    ],
    ids=str,
)
def test_ops_are_registered_as_they_behave(layout, dtype):
    feature = lay_out(normal(3, 4, 3, 5, dtype=dtype), layout)
    constant = layout in ("contiguous", "stepped")
    for values in (normal(3, 4, seed=1) if constant else normal(3, 4, 3, 5, seed=1, dtype=dtype),):
        for op, arguments in (
            ("channel_dot", (values, feature)),
            ("channel_scale", (normal(3, 3, 5), values, layout == "channels_last", dtype)),
        ):
            pytest.importorskip("expecttest")  # which opcheck needs
            results = torch.library.opcheck(getattr(torch.ops.debiaskd, op).default, arguments)
            assert set(results.values()) == {"SUCCESS"}, results
