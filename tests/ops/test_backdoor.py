"""`backdoor_logits`: its value and its gradients, in both modes, on every backend."""

import math

import numpy as np
import pytest
import torch
from cases import DTYPES, GOLDEN, covering, every_way, lay_out, normal, poisoned_memory, threads, uniform
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import debiaskd as dk
from debiaskd.ops import backdoor as op

MODES = ("nwgm", "exact")
every_mode = pytest.mark.parametrize("mode", MODES)
#: (N, D, K, E): ordinary, one of everything, more classes than samples, long features, one sample.
SHAPES = ((7, 5, 4, 6), (1, 1, 1, 1), (3, 4, 50, 2), (40, 70, 3, 90), (1, 9, 17, 8))


def inputs(samples, length, classes, context_length, dtype=torch.float32, scale=1.0, seed=0):
    """(feature, logits, context, weight, bias); the head's logits are of the order of `scale`."""
    sizes = ((samples, length), (samples, classes), (classes, context_length), (classes, length + context_length))
    feature, logits, context, weight = (normal(*s, seed=seed + i, dtype=torch.float64) for i, s in enumerate(sizes))
    weight /= (length + context_length) ** 0.5
    bias = normal(classes, seed=seed + 9, dtype=torch.float64)
    return [x.to(dtype) for x in (feature * scale, logits * 3, context * scale, weight, bias)]


def oracle(feature, logits, context, weight, bias, upstream, temperature=4.0, mode="nwgm", prior=None):
    """Value and gradients of feature, weight and bias: one sample and one stratum after the other, in float64."""
    feature, logits, context, weight = (x.detach().cpu().double() for x in (feature, logits, context, weight))
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().cpu().double()
    leaves = [x.requires_grad_() for x in (feature, weight, bias)]
    rows = []
    for s, scores in zip(feature, logits):
        p = (scores / temperature).softmax(0) if prior is None else prior.cpu().double()
        if mode == "nwgm":
            rows.append(weight @ torch.cat([s, (p[:, None] * context).sum(0)]) + bias)
            continue
        heads = [(weight @ torch.cat([s, e]) + bias).log_softmax(0) + q.log() for q, e in zip(p, context) if q > 0]
        rows.append(torch.stack(heads).logsumexp(0))
    value = torch.stack(rows) if rows else logits * (feature.sum() + weight.sum() + bias.sum())
    return value.detach(), torch.autograd.grad(value, leaves, upstream.detach().cpu().double())


def run(way, feature, logits, context, weight, bias=None, upstream=None, **options):
    """As `oracle`, on one way."""
    leaves = [None if x is None else way.put(x.detach()).requires_grad_() for x in (feature, weight, bias)]
    options = {k: way.put(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with way.active():
        value = dk.backdoor_logits(leaves[0], way.put(logits), way.put(context), *leaves[1:], **options)
        gradients = torch.autograd.grad(value, [x for x in leaves if x is not None], way.put(upstream).to(value))
    return value.detach().cpu(), [g.cpu() for g in gradients]


def distance(actual, exact, made_of=0.1):
    """Largest error, relative to the largest value; what cancels to nearly zero is judged by what it was made of."""
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return 0.0
    worst = (actual.double() - exact).abs().max() / exact.abs().max().clamp(min=made_of)
    return worst.item() if worst == worst else math.inf


def check(way, *tensors, tolerance=1e-5, gradient_tolerance=2e-5, scale=1.0, **options):
    """`scale` is the order of the head's logits."""
    upstream = normal(*tensors[1].shape, seed=77)
    exact, exact_gradients = oracle(*tensors, upstream=upstream, **options)
    value, gradients = run(way, *tensors, upstream=upstream, **options)
    assert distance(value, exact, 0.1 * max(scale, 1)) <= tolerance
    for name, gradient, expected in zip(("feature", "weight", "bias"), gradients, exact_gradients):
        size = scale if name == "weight" else 1  # that of what its gradient is multiplied with
        assert distance(gradient, expected, 0.1 * max(size, 1)) <= gradient_tolerance, name


@every_way("backdoor")
@covering(mode=MODES, shape=SHAPES, dtype=DTYPES)
def test_value_and_gradients(way, mode, shape, dtype):
    tensors = inputs(*shape, dtype=dtype)
    # Computed in float32, whatever the inputs; a gradient is rounded to the dtype of its tensor.
    loose = {} if dtype.itemsize > 2 else {"gradient_tolerance": 2 * torch.finfo(dtype).eps}
    exact = {"tolerance": 1e-12, "gradient_tolerance": 1e-11} if dtype == torch.float64 else {}
    for bias in (tensors[4], None):
        check(way, *tensors[:4], bias, mode=mode, **loose, **exact)
    check(way, *tensors, mode=mode, temperature=0.7, **loose, **exact)
    with way.active():
        value = dk.backdoor_logits(*map(way.put, tensors), mode=mode)
    assert value.dtype == torch.promote_types(dtype, torch.float32)


@every_way("backdoor")
@pytest.mark.parametrize("name", ("cid0", "cid1"))
def test_reference_logits_and_gradients_are_reproduced(way, name):
    with np.load(GOLDEN / "cid.npz") as file:
        golden = {k.removeprefix(f"{name}_"): torch.as_tensor(file[k]) for k in file.files if k.startswith(name)}
    feature, weight, bias = (way.put(golden[k]).requires_grad_() for k in ("student", "weight", "bias"))
    logits, context, labels = (way.put(golden[k]) for k in ("student_logits", "context", "labels"))
    with way.active():
        temperature = golden["temperature"].item()
        value = dk.backdoor_logits(feature, logits, context, weight, bias, temperature=temperature)
    loss = torch.nn.functional.cross_entropy(value, labels)
    loss.backward()
    torch.testing.assert_close(value.detach().cpu(), golden["backdoor"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.detach().cpu(), golden["backdoor_ce"], rtol=1e-6, atol=0)
    for name, leaf in (("feature", feature), ("weight", weight), ("bias", bias)):
        torch.testing.assert_close(leaf.grad.cpu(), golden[f"backdoor_grad_{name}"], rtol=1e-4, atol=1e-7)


@every_way("backdoor")
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 4),
    scale=st.sampled_from((0.1, 1.0, 10.0, 30.0, 100.0, 1000.0)),
    seed=st.integers(0, 10**6),
    mode=st.sampled_from(MODES),
    with_prior=st.booleans(),
)
def test_any_shape_at_any_scale(way, shape, scale, seed, mode, with_prior):
    tensors = inputs(*shape, scale=scale, seed=seed)
    prior = torch.rand(shape[2], generator=torch.Generator().manual_seed(seed)).square() if mode == "exact" else None
    tolerance = 1e-5 if scale <= 1 else 1e-4
    check(
        way,
        *tensors,
        mode=mode,
        prior=prior if with_prior else None,
        scale=scale,
        tolerance=tolerance,
        gradient_tolerance=5 * tolerance * max(1.0, scale / 100),  # what rounding of logits so large leaves of softmax
    )


@every_way("backdoor")
@pytest.mark.parametrize(("scale", "tolerance"), ((1, 1e-5), (30, 1e-5), (1000, 1e-4)))
def test_exact_at_every_scale_of_features_and_contexts(way, scale, tolerance):
    check(way, *inputs(64, 48, 40, 32, scale=scale), mode="exact", tolerance=tolerance, gradient_tolerance=1e-4)


@every_way("backdoor")
@pytest.mark.parametrize("gap", (0, 20, 40, 43, 44, 44.5, 45, 50, 80, 90, 110, 300, 1e4))
def test_largest_entries_that_never_meet(way, gap):
    # Each class is far from the feature's favourite or from every context's: all products are exp(-gap), whatever the
    # shifts; beyond some gap they are nothing.
    feature, context = torch.eye(6)[:, :3].repeat_interleave(2, 0) * gap, torch.eye(3, 3) * gap
    feature += normal(12, 3) / 4
    context = torch.cat([context, context, context[:1]]) + normal(7, 3, seed=1) / 4
    weight = torch.cat([torch.eye(7, 3), torch.eye(7, 3).flip(0)], 1)
    check(
        way, feature, normal(12, 7), context, weight, normal(7), mode="exact", gradient_tolerance=max(gap / 1e7, 1e-4)
    )


@every_way("backdoor")
def test_prior_of_the_user(way):
    tensors = inputs(6, 5, 4, 3)
    prior = torch.tensor([0.5, 0.0, 0.2, 0.3])
    check(way, *tensors, mode="exact", prior=prior)
    upstream = torch.ones(6, 4)
    value, _ = run(way, *tensors, upstream=upstream, mode="exact", prior=prior)
    torch.testing.assert_close(value.exp().sum(1), torch.ones(6))
    counted, _ = run(way, *tensors, upstream=upstream, mode="exact", prior=prior * 40)
    torch.testing.assert_close(counted, value + math.log(40))
    alone, _ = run(way, *tensors, upstream=upstream, mode="exact", prior=torch.eye(4)[2])
    feature, _, context, weight, bias = tensors
    head = torch.cat([feature, context[2].expand(6, 3)], 1) @ weight.T + bias
    torch.testing.assert_close(alone, head.log_softmax(1))


@every_way("backdoor")
@every_mode
def test_no_samples(way, mode):
    check(way, *inputs(0, 5, 4, 3), mode=mode)


@every_way("backdoor")
@every_mode
@pytest.mark.parametrize("layout", ("reversed", "stepped", "offset", "expanded", "expanded_batch"))
def test_any_strides(way, mode, layout):
    tensors = [lay_out(x, layout) for x in inputs(6, 5, 4, 3)]
    with poisoned_memory():
        check(way, *tensors, mode=mode)


#: (N, Z, K) of the op itself, whose strata need not be as many as its classes: less than a tile of a GPU, several tiles
#: that are not full, tiles of another size, more classes than a block of threads looks through on its own, long sums.
OP_SHAPES = ((3, 5, 4), (33, 70, 45), (65, 36, 68), (5, 40, 301), (2, 1, 7), (40, 97, 3), (0, 5, 4))


#: Layouts and range of the logits, and how near their gradients come; each shape meets two of them.
PLACED = (
    (("contiguous", "contiguous"), 1, 2e-5),
    (("reversed", "offset"), 30, 1e-4),
    (("expanded_batch", "stepped"), 300, 2e-4),
    (("contiguous", "unaligned"), 300, 2e-4),
)


def placed(values, layout):
    if layout != "unaligned":
        return lay_out(values, layout)
    # Every row begins 4 bytes behind a multiple of 16.
    memory = torch.full((len(values), -(-values.shape[1] // 4) * 4 + 4), math.nan)
    return memory[:, 1 : 1 + values.shape[1]].copy_(values)


@every_way("backdoor")
@pytest.mark.parametrize(
    ("shape", "layouts", "scale", "tolerance"),
    [(shape, *PLACED[(i + j) % 4]) for i, shape in enumerate(OP_SHAPES) for j in (0, 2)],
    ids=str,
)
def test_logits_and_log_prior_of_any_shape_layout_and_range(way, shape, layouts, scale, tolerance):
    samples, strata, classes = shape
    prior = uniform(samples, strata).log()
    prior[:, 1::3] = -math.inf
    a, b = normal(samples, classes) * scale, normal(strata, classes, seed=1) * scale
    leaves = [way.put(placed(x, layout)).requires_grad_() for x, layout in zip((a, b), layouts)]
    prior, upstream = placed(prior, layouts[0]), placed(normal(samples, classes, seed=2), layouts[1])
    exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
    expected = op.eager(*exact, prior.double())
    with way.active(), poisoned_memory():
        value = op._exact(*leaves, way.put(prior))
        gradients = torch.autograd.grad(value, leaves, way.put(upstream))
    assert distance(value.detach().cpu(), expected.detach()) <= 1e-5
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, exact, upstream.double())):
        assert distance(gradient.cpu(), wanted, made_of=1) <= tolerance


@every_way("backdoor")
@pytest.mark.parametrize(("scale", "dtype"), ((1, torch.float32), (1000, torch.float32), (30, torch.float64)), ids=str)
def test_every_element_is_written_and_threads_change_no_bit(way, scale, dtype):
    tensors = inputs(33, 20, 45, 20, scale=scale, dtype=dtype)
    results = []
    for count in (1, 2, 2):
        with threads(count), poisoned_memory():
            value, gradients = run(way, *tensors, upstream=normal(33, 45), mode="exact")
        results.append((value, *gradients))
        assert all(x.isfinite().all() for x in results[-1])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@every_way("backdoor")
@every_mode
@pytest.mark.parametrize("which", (0, 1, 2, 3, 4))
def test_a_broken_input_shows_in_the_result(way, mode, which):
    tensors = inputs(6, 5, 4, 3)
    tensors[which][(2,) * tensors[which].dim()] = math.nan
    with way.active():
        value = dk.backdoor_logits(*map(way.put, tensors), mode=mode)
    assert value.isnan().any()


@every_way("backdoor")
@pytest.mark.parametrize("trained", ((0,), (3,), (4,), (0, 4), (0, 3)), ids=str)
@every_mode
def test_only_what_asks_for_a_gradient_gets_one(way, trained, mode):
    tensors = [way.put(x) for x in inputs(6, 5, 4, 3)]
    upstream = normal(6, 4)
    expected = dict(zip((0, 3, 4), oracle(*tensors, upstream=upstream, mode=mode)[1]))
    for i in trained:
        tensors[i].requires_grad_()
    tensors[1].requires_grad_()  # the student's own logits may, and get nothing
    with way.active():
        dk.backdoor_logits(*tensors, mode=mode).backward(way.put(upstream))
    for i, tensor in enumerate(tensors):
        assert (tensor.grad is not None) == (i in trained)
        if i in trained:
            assert distance(tensor.grad.cpu(), expected[i]) <= 1e-5


@every_mode
@pytest.mark.parametrize("shape", ((64, 100, 5, 100), (5, 100, 200, 90), (50, 3, 50, 4), (20, 60, 20, 1)), ids=str)
@pytest.mark.parametrize("trained", (True, False))
def test_no_more_products_than_needed(mode, shape, trained):
    tensors = inputs(*shape)
    tensors[0].requires_grad_()
    tensors[3].requires_grad_(trained)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, dk.backend("eager"):
        dk.backdoor_logits(*tensors, mode=mode).sum().backward()
    n, d, k, e = shape
    head = n * d * k * (2 + trained)
    context = k * e * k * (1 + trained)
    if mode == "nwgm":
        context = min(n * k * e * (2 + trained), context + n * k * k * (1 + trained))
    assert counter.get_total_flops() == 2 * (head + context)


@every_way("backdoor")
def test_exact_holds_nothing_of_samples_times_strata_times_classes(way):
    tensors = inputs(64, 8, 300, 8)
    tensors[3].requires_grad_()
    with way.active(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        dk.backdoor_logits(*map(way.put, tensors), mode="exact").sum().backward()
    level = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    tile = 4 * op.TILE if way.name == "eager" else 0
    assert 0 < peak <= 12 * 4 * (2 * 64 * 300 + 300 * 300) + 5 * tile
    assert peak < 4 * 64 * 300 * 300 or tile
