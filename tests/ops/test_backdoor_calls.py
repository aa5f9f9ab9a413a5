"""`backdoor_logits`: what autograd, autocast and compilation may do with it, and what it says to wrong arguments."""

import copy
import pickle

import pytest
import torch
from cases import every_way, lay_out, normal, way_param, ways
from test_backdoor import MODES, distance, every_mode, inputs, oracle

import debiaskd as dk
from debiaskd.ops import backdoor as op
from debiaskd.ops import backend

pytestmark = pytest.mark.usefixtures("one_thread")
needs_native = pytest.mark.skipif(not backend.native, reason="the native libraries are not built")


def leaves(way, *shape, dtype=torch.float32):
    feature, logits, context, weight, bias = (way.put(x) for x in inputs(*shape, dtype=dtype))
    return [x.requires_grad_() for x in (feature, weight, bias)], logits, context


def call(function, trained, logits, context, **options):
    feature, weight, bias = trained
    return function(feature, logits, context, weight, bias, **options)


# ---- autograd -------------------------------------------------------------------------------------------------------


@every_way("backdoor")
@every_mode
@pytest.mark.parametrize("shape", ((3, 2, 4, 3), (6, 4, 2, 5)), ids=str)
def test_gradcheck(way, mode, shape):
    trained, logits, context = leaves(way, *shape, dtype=torch.float64)
    with way.active():
        assert torch.autograd.gradcheck(
            lambda *x: call(dk.backdoor_logits, x, logits, context, mode=mode),
            trained,
            fast_mode=way.name == "triton",  # interpreted, whose every call takes milliseconds
        )


@every_way("backdoor")
@every_mode
def test_second_derivatives_are_right_or_raise(way, mode):
    trained, logits, context = leaves(way, 3, 2, 4, 3, dtype=torch.float64)
    with way.active():
        if mode == "nwgm" or way.name.startswith("eager"):
            assert torch.autograd.gradgradcheck(
                lambda *x: call(dk.backdoor_logits, x, logits, context, mode=mode), trained
            )
            return
        value = call(dk.backdoor_logits, trained, logits, context, mode=mode)
        gradients = torch.autograd.grad(value.sum(), trained, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of backdoor_logits was differentiated again"):
        sum(g.sum() for g in gradients).backward()


@every_way("backdoor")
@every_mode
def test_gradient_is_linear_in_the_upstream_gradient_of_a_retained_graph(way, mode):
    trained, logits, context = leaves(way, 6, 5, 4, 3)
    with way.active():
        value = call(dk.backdoor_logits, trained, logits, context, mode=mode)
    upstream = way.put(normal(6, 4))
    unit = torch.autograd.grad(value, trained, upstream, retain_graph=True)
    again = torch.autograd.grad(value, trained, upstream, retain_graph=True)
    assert all(map(torch.equal, unit, again))
    for scale in (-2.5, 0.0, 1e6):
        for g, expected in zip(torch.autograd.grad(value, trained, upstream * scale, retain_graph=True), unit):
            torch.testing.assert_close(g, expected * scale, rtol=1e-5, atol=1e-6 * max(abs(scale), 1))


@every_way("backdoor")
@every_mode
def test_without_a_gradient_the_value_is_the_same(way, mode):
    trained, logits, context = leaves(way, 6, 5, 4, 3)
    with way.active():
        value = call(dk.backdoor_logits, trained, logits, context, mode=mode)
        with torch.no_grad():
            plain = call(dk.backdoor_logits, trained, logits, context, mode=mode)
    torch.testing.assert_close(plain, value.detach(), rtol=1e-6, atol=1e-6)
    assert not plain.requires_grad


# ---- autocast, compilation, modules ---------------------------------------------------------------------------------


@every_way("backdoor")
@every_mode
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_changes_no_bit(way, mode, dtype):
    (feature, weight, bias), logits, context = leaves(way, 6, 5, 4, 3)
    feature = feature.detach().to(dtype)
    upstream = way.put(normal(6, 4))
    with way.active():
        expected = dk.backdoor_logits(feature.float(), logits, context, weight, bias, mode=mode)
        gradients = torch.autograd.grad(expected, (weight, bias), upstream)
        with torch.autocast(way.device, dtype):
            value = dk.backdoor_logits(feature, logits, context, weight, bias, mode=mode)
            inside = torch.autograd.grad(value, (weight, bias), upstream)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert all(map(torch.equal, inside, gradients))


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("mode", "compiler", "way"),
    [
        way_param(way, f"{mode}-{compiler}-{way.name}", mode, compiler)
        for mode in MODES
        for compiler in ("aot_eager", "inductor")
        for way in ways("backdoor")
        # In "nwgm" all ways run the same operators of PyTorch. Inductor begins as aot_eager does, and calls native ops
        # as they are.
        if (compiler == "inductor") == (way.name in ("eager", "cpp")) and (mode == "exact" or way.name == "eager")
    ],
)
def test_one_compiled_graph_equals_the_plain_call(way, mode, compiler):
    torch.compiler.reset()
    trained, logits, context = leaves(way, 6, 5, 4, 3)
    prior = way.put(torch.tensor([0.1, 0.2, 0.3, 0.4])) if mode == "exact" else None

    def function(*arguments):
        return dk.backdoor_logits(*arguments, mode=mode, prior=prior) * 3

    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    upstream = way.put(normal(6, 4))
    with way.active():
        results = []
        for f in (compiled, function):
            value = call(f, trained, logits, context)
            results.append((value.detach(), *torch.autograd.grad(value, trained, upstream)))
        for actual, expected in zip(*results):
            torch.testing.assert_close(actual, expected)
        with torch.no_grad():
            torch.testing.assert_close(call(compiled, trained, logits, context), results[0][0])
    torch.compiler.reset()


@needs_native
@pytest.mark.compiles
@pytest.mark.parametrize("samples", (0, 5))
@pytest.mark.parametrize("layout", ("contiguous", "reversed", "expanded"))
def test_opcheck(samples, layout):
    # Strata need not be as many as classes here.
    shapes = ((samples, 4), (3, 4), (samples, 3))
    a, b, prior = (lay_out(normal(*shape, seed=i), layout) for i, shape in enumerate(shapes))
    output, norm = torch.ops.debiaskd.backdoor(a, b, prior)
    oracle = op.eager(a, b, prior)
    torch.testing.assert_close(output, oracle, rtol=1e-5, atol=1e-5)
    calls = [("backdoor", (a, b, prior))]
    for with_context in (True, False):
        calls.append(("backdoor_backward", (normal(samples, 4), a, b, prior, norm, output, with_context)))
    for name, arguments in calls:
        pytest.importorskip("expecttest")  # which opcheck needs
        results = torch.library.opcheck(getattr(torch.ops.debiaskd, name).default, arguments)
        assert set(results.values()) == {"SUCCESS"}, results


@every_mode
def test_module_is_the_function_with_its_options(mode):
    feature, logits, context, weight, bias = inputs(6, 5, 4, 3)
    module = dk.BackdoorLogits(temperature=2.0, mode=mode)
    assert repr(module) == f"BackdoorLogits(temperature=2.0, mode={mode!r})"
    for copied in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        value = copied(feature, logits, context, weight, bias)
        expected = dk.backdoor_logits(feature, logits, context, weight, bias, temperature=2.0, mode=mode)
        assert torch.equal(value, expected)
    for wrong in ({"mode": "both"}, {"temperature": 0}):
        with pytest.raises(ValueError):
            dk.BackdoorLogits(**wrong)


def test_eager_makes_the_same_in_small_tiles(monkeypatch):
    tensors = inputs(9, 5, 7, 3)
    upstream = normal(9, 7)
    expected, gradients = oracle(*tensors, upstream=upstream, mode="exact")
    for tile in (1, 20, 100):
        monkeypatch.setattr(op, "TILE", tile)
        with dk.backend("eager"):
            trained = [tensors[i].requires_grad_() for i in (0, 3, 4)]
            value = dk.backdoor_logits(*tensors, mode="exact")
        assert distance(value.detach(), expected) <= 1e-5
        for actual, exact in zip(torch.autograd.grad(value, trained, upstream), gradients):
            assert distance(actual, exact) <= 1e-5
        for tensor in trained:
            tensor.requires_grad_(False)


# ---- wrong arguments ------------------------------------------------------------------------------------------------

ORDINARY = dict(zip(("feature", "logits", "context", "weight", "bias"), inputs(6, 5, 4, 3)))
GRADIENT = "must not require grad (it gets no gradient here), got requires_grad=True"
WRONG = (
    ({"feature": [1.0]}, TypeError, "feature must be a torch.Tensor, got list"),
    ({"feature": torch.zeros(6, 5).long()}, TypeError, "feature must be float32, bfloat16, float16 or float64"),
    ({"feature": torch.zeros(6, 5, 1)}, ValueError, "feature must have shape [N,D], got [6, 5, 1]"),
    ({"logits": torch.zeros(4)}, ValueError, "logits must have shape [N,K], got [4]"),
    ({"logits": torch.zeros(5, 4)}, ValueError, "logits must have shape [N,K]=[6, 4], got [5, 4]"),
    ({"logits": torch.zeros(6, 0)}, ValueError, "logits must have at least one class, got [6, 0]"),
    (
        {"logits": torch.zeros(6, 4, device="meta")},
        ValueError,
        "logits must be on the device of feature, cpu, got meta",
    ),
    ({"context": torch.zeros(3, 3)}, ValueError, "context must have shape [K,E]=[4, 3], got [3, 3]"),
    ({"context": torch.zeros(4, 3, requires_grad=True)}, ValueError, f"context {GRADIENT}"),
    ({"weight": torch.zeros(4, 5)}, ValueError, "weight must have shape [K,D+E]=[4, 8], got [4, 5]"),
    ({"weight": torch.zeros(4, 8).double()}, TypeError, "weight must have the dtype of feature, torch.float32, got"),
    ({"bias": torch.zeros(3)}, ValueError, "bias must have shape [K]=[4], got [3]"),
    ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0, got 0.0"),
    ({"temperature": "4"}, TypeError, "temperature must be a number, got str"),
    ({"mode": "mean"}, ValueError, "mode must be one of 'nwgm', 'exact', got 'mean'"),
    ({"prior": torch.ones(4)}, ValueError, "prior must be None unless mode=\"exact\", got one with mode='nwgm'"),
    ({"mode": "exact", "prior": torch.ones(6, 4)}, ValueError, "prior must have shape [K]=[4], got [6, 4]"),
    ({"mode": "exact", "prior": torch.ones(4, requires_grad=True)}, ValueError, f"prior {GRADIENT}"),
    ({"mode": "exact", "prior": -torch.ones(4)}, ValueError, "prior must be finite and >= 0 everywhere, got values in"),
    ({"mode": "exact", "prior": torch.zeros(4)}, ValueError, "prior must be positive somewhere, got zeros only"),
)


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[w[2].split(",")[0] for w in WRONG])
def test_wrong_arguments(change, error, message):
    with pytest.raises(error) as caught:
        dk.backdoor_logits(**{**ORDINARY, **change})
    assert str(caught.value).startswith(message)


def test_modes_are_all():
    assert op.MODES == MODES
