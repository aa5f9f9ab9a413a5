"""`channel_dot`: its value, its gradients and theirs, on every backend."""

import math

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    GOLDEN,
    LAYOUTS,
    assert_accurate,
    covering,
    each_layout_and_dtype,
    every_way,
    lay_out,
    normal,
    poisoned_memory,
    threads,
)
from hypothesis import given
from hypothesis import strategies as st

import debiaskd as dk


def oracle(gradient, feature, upstream):
    """Map and both gradients, channel by channel, in NumPy."""
    g, a, m = (x.detach().cpu().double().numpy() for x in (gradient, feature, upstream))
    constant = g.ndim == 2
    out, for_gradient, for_feature = np.zeros(m.shape), np.zeros(g.shape), np.zeros(a.shape)
    for c in range(a.shape[1]):
        each = g[:, c, None, None] if constant else g[:, c]
        out += each * a[:, c]
        for_gradient[:, c] = (m * a[:, c]).sum((1, 2)) if constant else m * a[:, c]
        for_feature[:, c] = m * each
    return tuple(map(torch.as_tensor, (out, for_gradient, for_feature)))


def run(gradient, feature, upstream):
    gradient, feature = (x.detach().requires_grad_() for x in (gradient, feature))
    out = dk.channel_dot(gradient, feature)
    gradients = torch.autograd.grad(out, (gradient, feature), upstream)
    for given_tensor, made in zip((gradient, feature), gradients):
        assert made.shape == given_tensor.shape
        assert made.dtype == given_tensor.dtype
    return out.detach(), *gradients


def check(way, gradient, feature):
    """This way against the oracle, judged by what plain PyTorch manages."""
    wide = torch.promote_types(feature.dtype, torch.float32)
    upstream = normal(feature.shape[0], *feature.shape[2:], seed=7, dtype=wide)
    with way.active():
        actual = run(*map(way.put, (gradient, feature, upstream)))
    with dk.backend("eager"):
        eager = run(gradient, feature, upstream)
    for a, x, e, what in zip(actual, oracle(gradient, feature, upstream), eager, ("map", "gradient's", "feature's")):
        if a.dtype == torch.float64:  # of a gradient [N,C], whose digits beyond those of the feature count for nothing
            a, e = a.to(wide), e.to(wide)
        assert_accurate(a, x, e, f"{what} {feature.dtype} {list(feature.shape)} {gradient.stride()} {feature.stride()}")


@st.composite
def problems(draw):
    shape = [draw(st.sampled_from(sizes)) for sizes in ((0, 1, 2, 5), (0, 1, 2, 3, 7, 33), (0, 1, 2, 5), (1, 3, 6))]
    seed, dtype = draw(st.integers(0, 1000)), draw(st.sampled_from(DTYPES))
    feature = lay_out(normal(*shape, seed=seed, dtype=dtype), draw(st.sampled_from(LAYOUTS)))
    if draw(st.booleans()):
        other = draw(st.sampled_from(DTYPES))
        values, layouts = normal(*shape[:2], seed=seed + 1, dtype=other), ("contiguous", "reversed", "stepped")
    else:
        values, layouts = normal(*shape, seed=seed + 1, dtype=dtype), LAYOUTS
    return lay_out(values, draw(st.sampled_from(layouts))), feature


@every_way("channel_dot")
@given(problem=problems())
def test_any_shape_layout_and_dtype_agrees_with_the_oracle(way, problem):
    check(way, *problem)


LARGE = [
    ((1, 2048, 7, 7), ("contiguous", "contiguous")),
    ((1, 2048, 7, 7), ("channels_last", "channels_last")),
    ((2, 515, 9, 7), ("channels_last", "contiguous")),
    ((2, 70, 70, 70), ("contiguous", "contiguous")),
    ((1, 130, 50, 50), ("stepped", "reversed")),
    ((17, 65, 3, 5), ("contiguous", "offset")),
    ((1, 8, 151, 109), ("contiguous", "contiguous")),
    ((1, 8, 151, 109), ("channels_last", "channels_last")),
    ((8, 515, 3, 3), ("channels_last", "channels_last")),
    ((1, 20000, 1, 2), ("channels_last", "channels_last")),
]


@every_way("channel_dot")
@pytest.mark.parametrize(
    ("shape", "layouts", "dtype"),
    [(*large, DTYPES[i % 4]) for i, large in enumerate(LARGE)],
    ids=str,
)
def test_long_sums_and_large_maps_are_as_accurate(way, dtype, shape, layouts):
    gradient, feature = (lay_out(normal(*shape, seed=i, dtype=dtype), layout) for i, layout in enumerate(layouts))
    check(way, gradient, feature)
    check(way, gradient[:, :, 0, 0], feature)


def cut_out(values, layout, larger):
    """The values in the corner of larger memory, which holds NaN elsewhere."""
    memory = lay_out(torch.full(larger, math.nan, dtype=values.dtype), layout)
    return memory[tuple(slice(0, n) for n in values.shape)].copy_(values)


@every_way("channel_dot")
@covering(
    dtype=(torch.float32, torch.bfloat16),
    layout=("contiguous", "channels_last"),
    shape=[(2, 16, 3, 5), (3, 7, 4, 8), (2, 40, 1, 1), (1, 64, 1, 9)],
)
def test_rows_begin_anywhere_in_memory(way, shape, layout, dtype):
    gradient, feature = (lay_out(normal(*shape, seed=i, dtype=dtype), layout) for i in (0, 1))
    check(way, gradient, feature)
    check(way, gradient[:, :, 0, 0], feature)
    # Rows that begin at every number, at every second one, at no multiple of a vector, and at every vector.
    for axis, extra in ((1, 1), (1, 8), (2, 5), (3, 1), (3, 2), (3, 8)):
        larger = [n + extra * (i == axis) for i, n in enumerate(shape)]
        check(way, cut_out(gradient, layout, larger), cut_out(feature, layout, larger))
        if axis != 2:
            check(way, gradient[:, :, 0, 0], cut_out(feature, layout, larger))


@every_way("channel_dot")
@pytest.mark.parametrize("offset", (1, 4, 8))
def test_numbers_begin_anywhere_in_memory(way, offset):
    weight = torch.full((offset + 48,), math.nan)[offset:].view(3, 16).copy_(normal(3, 16))
    check(way, weight, lay_out(normal(3, 16, 2, 3, seed=1, dtype=torch.bfloat16), "channels_last"))


@every_way("channel_dot")
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_gradient_expanded_from_one_number_a_channel_is_that_number(way, layout):
    # What autograd gives behind global average pooling.
    feature, weight = way.put(lay_out(normal(3, 40, 5, 6), layout)), way.put(normal(3, 40, seed=1))
    with way.active():
        expanded = dk.channel_dot(weight[:, :, None, None].expand(3, 40, 5, 6), feature)
        torch.testing.assert_close(expanded, dk.channel_dot(weight, feature))


def golden():
    with np.load(GOLDEN / "attribution.npz") as file:
        return {key.removeprefix("attr0_"): torch.as_tensor(file[key]) for key in file.files}


@every_way("channel_dot")
def test_reference_input_times_gradient_and_gradcam_are_reproduced(way):
    reference = golden()
    feature, gradient = way.put(reference["feature"]), way.put(reference["gradient"])
    with way.active():
        torch.testing.assert_close(dk.channel_dot(gradient, feature).cpu(), reference["ixg"])
        torch.testing.assert_close(dk.channel_dot(gradient.mean((2, 3)), feature).relu().cpu(), reference["gradcam"])


@every_way("channel_dot")
def test_reference_maps_of_a_pooled_linear_head_are_the_closed_form(way):
    reference = golden()
    feature, area = way.put(reference["feature"]), 16 * 16
    weight = way.put(reference["cam_weight"][reference["target"]])
    with way.active():
        closed = dk.channel_dot(weight / area, feature).cpu()
    torch.testing.assert_close(closed, reference["cam_ixg"])
    torch.testing.assert_close(closed.relu(), reference["cam_gradcam"])


@every_way("channel_dot")
@each_layout_and_dtype
def test_every_element_is_written(way, layout, dtype):
    feature = way.put(lay_out(normal(2, 5, 6, 7, dtype=dtype), layout))
    wide = torch.promote_types(dtype, torch.float32)
    for shape in ((2, 5, 6, 7), (2, 5)):
        gradient, upstream = way.put(normal(*shape, seed=1, dtype=dtype)), way.put(normal(2, 6, 7, dtype=wide))
        with way.active(), poisoned_memory():
            for written in run(gradient, feature, upstream):
                assert written.isfinite().all()


@every_way("channel_dot")
@pytest.mark.parametrize(
    ("dtype", "layout", "shape"),
    [
        (torch.float32, "contiguous", (1, 3000, 9, 9)),
        (torch.bfloat16, "channels_last", (1, 3000, 9, 9)),
        (torch.float16, "contiguous", (9, 300, 15, 15)),
        (torch.float64, "reversed", (1, 3000, 9, 9)),
        (torch.float32, "channels_last", (9, 300, 15, 15)),
    ],
    ids=str,
)
def test_same_inputs_give_the_same_bits_with_one_thread_and_with_two(way, layout, dtype, shape):
    counts = (1, 2, 2)
    if way.name not in ("cpp", "eager"):  # the others have threads of their own
        counts, shape = (1, 1), (min(shape[0], 2), shape[1] // 3, *shape[2:])
    gradient, feature = (way.put(lay_out(normal(*shape, seed=i, dtype=dtype), layout)) for i in (0, 1))
    upstream = way.put(normal(shape[0], *shape[2:], dtype=torch.promote_types(dtype, torch.float32)))
    results = []
    for count in counts:
        with way.active(), threads(count):
            results.append([*run(gradient, feature, upstream), *run(gradient[:, :, 0, 0], feature, upstream)])
    if way.name == "eager":  # plain PyTorch promises as much only where it sums in one thread
        results = results[1:]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@every_way("channel_dot")
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_broken_feature_shows_where_it_is(way, value):
    gradient, feature = normal(2, 300, 3, 3), normal(2, 300, 3, 3, seed=1)
    feature[1, 77, 2, 0] = value
    with way.active():
        out = dk.channel_dot(way.put(gradient), way.put(feature)).cpu()
    assert (~out.isfinite()).nonzero().tolist() == [[1, 2, 0]]


BAD = [
    ({"gradient": [1.0]}, TypeError, r"gradient must be a torch\.Tensor, got list"),
    ({"gradient": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, r"gradient must be float32.*got torch\.int64"),
    ({"feature": torch.zeros(2, 3, 4)}, ValueError, r"feature must have shape \[N,C,H,W\], got \[2, 3, 4\]"),
    ({"feature": torch.zeros(2, 3, 4, 5).bool()}, TypeError, r"feature must be float32.*got torch\.bool"),
    ({"gradient": torch.zeros(2, 4)}, ValueError, r"gradient must have shape \[N,C\]=\[2, 3\], got \[2, 4\]"),
    ({"gradient": torch.zeros(2, 3, 5, 4)}, ValueError, r"gradient must have shape that of feature=\[2, 3, 4, 5\]"),
    ({"gradient": torch.zeros(2)}, ValueError, r"gradient must have shape \[N,C,H,W\] or \[N,C\], got \[2\]"),
    ({"gradient": torch.zeros(2, 3, 4, 5).double()}, TypeError, r"gradient must have the dtype of feature.*float64"),
    ({"gradient": torch.zeros(2, 3, device="meta")}, ValueError, r"gradient must be on the device of feature, cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_inputs_are_named(change, error, message):
    arguments = {"gradient": torch.zeros(2, 3, 4, 5), "feature": torch.zeros(2, 3, 4, 5)} | change
    with pytest.raises(error, match=message):
        dk.channel_dot(**arguments)


def test_module_is_the_function():
    gradient, feature = normal(2, 3), normal(2, 3, 4, 5)
    assert torch.equal(dk.ChannelDot()(gradient, feature), dk.channel_dot(gradient, feature))
