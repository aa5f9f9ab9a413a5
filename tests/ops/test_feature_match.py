"""`feature_match_loss`: its value and its gradient, on every backend. For autograd's sake: test_autograd.py."""

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    GOLDEN,
    LAYOUTS,
    REDUCTIONS,
    assert_accurate,
    covering,
    each_layout_and_dtype,
    every_way,
    feature_match_oracle,
    lay_out,
    normal,
    poisoned_memory,
    threads,
    uniform,
)
from hypothesis import given
from hypothesis import strategies as st

import debiaskd as dk
from debiaskd.ops import backend
from debiaskd.ops.feature_match import _dense

pytestmark = pytest.mark.usefixtures("one_thread")


def loss_and_gradient(student, teacher, weight=None, upstream=None, **options):
    student = student.detach().requires_grad_()
    loss = dk.feature_match_loss(student, teacher, weight, **options)
    upstream = torch.ones_like(loss) if upstream is None else torch.as_tensor(upstream).to(loss)
    (gradient,) = torch.autograd.grad(loss, student, upstream)
    assert gradient.shape == student.shape
    assert gradient.dtype == student.dtype
    return loss.detach(), gradient


def check(way, student, teacher, weight=None, upstream=1.0, **options):
    """This way against the oracle, judged by what plain PyTorch manages."""
    placed = [None if x is None else way.put(x) for x in (student, teacher, weight)]
    with way.active():
        actual = loss_and_gradient(*placed, upstream, **options)
    with dk.backend("eager"):
        eager = loss_and_gradient(student, teacher, weight, upstream, **options)
    exact = feature_match_oracle(student, teacher, weight, upstream=upstream, **options)
    for a, x, e, what in zip(actual, exact, eager, ("loss", "gradient")):
        assert_accurate(a, x, e, f"{what} {options} {student.dtype} {list(student.shape)} {student.stride()}")


@pytest.mark.parametrize(
    ("layouts", "copied"),
    [
        (("contiguous", "contiguous"), (False, False)),
        (("channels_last", "channels_last"), (False, False)),
        (("channels_last", "contiguous"), (False, True)),
        (("contiguous", "channels_last"), (False, True)),
        (("stepped", "contiguous"), (True, False)),
        (("reversed", "reversed"), (True, True)),
        (("expanded", "contiguous"), (True, False)),
    ],
    ids=str,
)
def test_what_is_neither_contiguous_nor_channels_last_is_copied(layouts, copied):
    student, teacher = (lay_out(normal(3, 4, 5, 6, seed=i), layout) for i, layout in enumerate(layouts))
    dense = _dense(student, teacher)
    assert tuple(d.data_ptr() != x.data_ptr() for d, x in zip(dense, (student, teacher))) == copied
    assert torch.equal(dense[0], student)
    assert torch.equal(dense[1], teacher)
    assert dense[0].stride() == dense[1].stride()


@pytest.mark.skipif(not backend.native, reason="the native libraries are not built")
@pytest.mark.parametrize("layouts", (("stepped", "stepped"), ("contiguous", "channels_last")), ids=str)
def test_native_op_refuses_what_is_not_dense_in_one_order(layouts):
    student, teacher = (lay_out(normal(3, 4, 5, 6, seed=i), layout) for i, layout in enumerate(layouts))
    with pytest.raises(RuntimeError, match="student and teacher must be dense"):
        torch.ops.debiaskd.feature_match(student, teacher, None, False, 1, True)


sizes = st.sampled_from((1, 2, 3, 5, 7, 16, 33))


@st.composite
def problems(draw):
    """Student, teacher and weight: 1 to 5 axes, each of both tensors in a layout of its own."""
    samples = draw(st.sampled_from((0, 1, 2, 3, 5)))
    shape = (samples, *draw(st.lists(sizes, max_size=2)), *draw(st.lists(st.sampled_from((1, 2, 3)), max_size=2)))
    seed, dtype = draw(st.integers(0, 1000)), draw(st.sampled_from(DTYPES))
    student = lay_out(normal(*shape, seed=seed, dtype=dtype), draw(st.sampled_from(LAYOUTS)))
    teacher = lay_out(normal(*shape, seed=seed + 1, dtype=dtype), draw(st.sampled_from(LAYOUTS)))
    weight = None
    if draw(st.booleans()):
        weight = uniform(samples, seed=seed, dtype=draw(st.sampled_from(DTYPES))) * 10
        weight = lay_out(weight * (normal(samples, seed=seed) > -1), draw(st.sampled_from(("contiguous", "stepped"))))
    return student, teacher, weight


@every_way("feature_match")
@given(
    problem=problems(),
    normalize=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    scale=st.sampled_from((1.0, -0.3, 1000.0)),
)
def test_any_shape_layout_and_dtype_agrees_with_the_oracle(way, problem, normalize, reduction, scale):
    upstream = scale
    if reduction == "none":
        upstream = (scale * normal(problem[0].shape[0], seed=9).double()).numpy()
    check(way, *problem, upstream, normalize=normalize, reduction=reduction)


@every_way("feature_match")
@covering(
    dtype=DTYPES,
    normalize=(False, True),
    shape__layouts=[
        ((3, 40001), ("contiguous", "contiguous")),
        ((2, 40001), ("stepped", "offset")),
        ((2, 129, 17, 17), ("channels_last", "contiguous")),
        ((2, 33, 28, 28), ("channels_last", "channels_last")),
        ((500,), ("contiguous", "stepped")),
    ],
)
def test_samples_longer_than_a_block_and_awkward_lengths_are_as_accurate(way, dtype, normalize, shape, layouts):
    student, teacher = (lay_out(normal(*shape, seed=i, dtype=dtype), layout) for i, layout in enumerate(layouts))
    check(way, student, teacher, uniform(shape[0]), 3.0, normalize=normalize, reduction="mean")


@every_way("feature_match")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layouts", (("stepped", "contiguous"), ("reversed", "stepped")), ids=str)
def test_axes_may_be_many_and_in_any_order(way, layouts, dtype):
    shape = (3, 2, 3, 2, 2, 3, 2, 3)
    student, teacher = (lay_out(normal(*shape, seed=i, dtype=dtype), layout) for i, layout in enumerate(layouts))
    for upstream in (1.0, 0.7):
        check(way, student, teacher, uniform(3), upstream, normalize=True, reduction="mean")


@every_way("feature_match")
@pytest.mark.parametrize("upstream", (1.0, -0.3))
def test_gradients_too_large_for_the_caches(way, upstream):
    # From 16 MiB on the gradient is streamed past them; the odd length leaves every sample unaligned but the first.
    # What is interpreted has caches of no size in particular, and takes seconds for what they do not hold.
    length = 100_003 if way.name in ("triton", "cuda_on_cpu") else 1_400_003
    student, teacher = normal(3, length), normal(3, length, seed=1)
    check(way, student, teacher, uniform(3), upstream, normalize=False, reduction="mean")


@every_way("feature_match")
@covering(
    normalize=(False, True),
    layout=("contiguous", "stepped"),
    dtype=(torch.float32, torch.bfloat16, torch.float16),
)
def test_long_sums_of_equal_differences_do_not_drift(way, normalize, layout, dtype):
    # Rounding that always errs to the same side shows in sums of equal numbers, and in no random ones.
    student, teacher = (lay_out(torch.full((1, 2**18), value, dtype=dtype), layout) for value in (0.1, 0.7))
    check(way, student, teacher, normalize=normalize)


@every_way("feature_match")
@pytest.mark.parametrize("name", ("cid0", "cid1"))
def test_reference_sample_loss_and_gradient_are_reproduced(way, name):
    with np.load(GOLDEN / "cid.npz") as file:
        golden = {k.removeprefix(f"{name}_"): torch.as_tensor(file[k]) for k in file.files if k.startswith(name)}
    student = way.put(golden["student"]).requires_grad_()
    weight, bias, teacher = (way.put(golden[k]) for k in ("projector_weight", "projector_bias", "teacher"))
    with way.active():
        loss = dk.feature_match_loss(torch.nn.functional.linear(student, weight, bias), teacher, normalize=True)
        loss.backward()
    torch.testing.assert_close(loss.detach().cpu(), golden["sample"], rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad.cpu(), golden["sample_grad"], rtol=1e-5, atol=1e-9)


@every_way("feature_match")
def test_mean_is_torch_mse_loss_with_weights(way):
    student, teacher, weight = normal(6, 5, 4), normal(6, 5, 4, seed=1), uniform(6)
    expected = torch.nn.functional.mse_loss(student, teacher, weight=weight[:, None, None].expand(6, 5, 4))
    with way.active():
        loss = dk.feature_match_loss(*map(way.put, (student, teacher, weight)))
    torch.testing.assert_close(loss.cpu(), expected)


@every_way("feature_match")
@pytest.mark.parametrize("shape", [(0, 3, 4), (0,), (3, 0), (2, 4, 0, 5), (0, 0)], ids=str)
def test_nothing_to_match_is_zero_with_a_zero_gradient(way, shape):
    student, teacher = way.put(torch.zeros(shape)), way.put(torch.zeros(shape))
    weight = way.put(torch.ones(shape[0]))
    for reduction, options in zip(REDUCTIONS, ({"weight": weight}, {"normalize": True}, {})):
        with way.active():
            loss, gradient = loss_and_gradient(student, teacher, reduction=reduction, **options)
        expected = [0.0] * shape[0] if reduction == "none" else 0.0
        assert loss.tolist() == expected
        assert gradient.shape == shape


@every_way("feature_match")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_weight_anywhere_is_zero_and_not_nan(way, reduction):
    with way.active():
        loss, gradient = loss_and_gradient(
            *(way.put(x) for x in (normal(3, 4), normal(3, 4, seed=1), torch.zeros(3))), reduction=reduction
        )
    assert not loss.any()
    assert not gradient.any()


@every_way("feature_match")
def test_teacher_of_zeros_counts_nothing_when_distances_are_relative(way):
    student, teacher = normal(3, 4), normal(3, 4, seed=1)
    teacher[1] = 0
    with way.active():
        loss, gradient = loss_and_gradient(way.put(student), way.put(teacher), normalize=True, reduction="none")
    assert loss[1] == 0
    assert loss[[0, 2]].min() > 0
    assert not gradient[1].any()


@every_way("feature_match")
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_precision_neither_overflows_in_the_sum_nor_underflows_in_the_gradient(way, dtype):
    # Squares of 300 overflow float16; a gradient of 2e-7 / 4096 underflows it, until a loss scaler multiplies it.
    student, teacher = torch.full((1, 4096), 300.0, dtype=dtype), torch.zeros(1, 4096, dtype=dtype)
    check(way, student, teacher, upstream=1.0, reduction="sum")
    check(way, student * 1e-4, teacher, upstream=65536.0, reduction="mean")
    with way.active():
        assert dk.feature_match_loss(way.put(student), way.put(teacher)).item() == pytest.approx(90000, rel=1e-2)


@every_way("feature_match")
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("scale", (1.0, 0.37, 1.7e-4, 1999.0))
def test_every_half_precision_number_is_read_and_written_exactly(way, dtype, scale):
    student = torch.arange(2**16).to(torch.int16).view(dtype)[None]
    weight = torch.tensor([scale * 2**15], dtype=torch.float64)  # so that the gradient is scale times the student
    with way.active():
        _, gradient = loss_and_gradient(
            way.put(student), way.put(torch.zeros_like(student)), way.put(weight), reduction="sum"
        )
    expected = (student.float() * torch.tensor(scale)).to(dtype)
    compared = ~((student.float() * 2).isinf() & student.isfinite())  # PyTorch doubles before it scales
    assert compared.sum() >= 2**16 - 256
    torch.testing.assert_close(gradient.cpu()[compared], expected[compared], rtol=0, atol=0, equal_nan=True)


@every_way("feature_match")
@pytest.mark.parametrize("where", ("student", "teacher"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_broken_feature_shows_in_the_loss(way, where, value):
    features = {"student": normal(2, 300), "teacher": normal(2, 300, seed=1)}
    features[where][1, 77] = value
    with way.active():
        loss = dk.feature_match_loss(*map(way.put, features.values()), reduction="none")
    assert loss.isfinite().tolist() == [True, False]


@every_way("feature_match")
@each_layout_and_dtype
@pytest.mark.parametrize("reduction", ("none", "mean"))
def test_every_element_is_written(way, layout, dtype, reduction):
    student = way.put(lay_out(normal(3, 5, 6, 7, dtype=dtype), layout))
    teacher = way.put(normal(3, 5, 6, 7, seed=1, dtype=dtype))
    with way.active(), poisoned_memory():
        loss, gradient = loss_and_gradient(student, teacher, reduction=reduction)
        again, graph = dk.feature_match_loss(student, teacher, reduction=reduction), student.detach().requires_grad_()
        total = dk.feature_match_loss(graph, teacher, reduction=reduction).sum()
        first, second = (torch.autograd.grad(total, graph, retain_graph=True)[0] for _ in range(2))
    for written in (loss, gradient, again, first, second):
        assert written.isfinite().all()


@every_way("feature_match")
@pytest.mark.parametrize(("dtype", "normalize"), [(dtype, i % 2 == 1) for i, dtype in enumerate(DTYPES)], ids=str)
def test_same_inputs_give_the_same_bits_with_one_thread_and_with_two(way, dtype, normalize):
    inputs = [way.put(x) for x in (normal(3, 41, 37, 29, dtype=dtype), normal(3, 41, 37, 29, seed=1, dtype=dtype))]
    results = []
    for count in (1, 2, 2):
        with way.active(), threads(count):
            results.append(loss_and_gradient(*inputs, normalize=normalize))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@every_way("feature_match")
@covering(reduction=REDUCTIONS, normalize=(False, True), layout=("contiguous", "channels_last", "stepped"))
def test_gradcheck(way, reduction, normalize, layout):
    student = way.put(lay_out(normal(3, 2, 3, 2, dtype=torch.float64), layout)).requires_grad_()
    teacher = way.put(normal(3, 2, 3, 2, seed=1, dtype=torch.float64))
    for weight in (None, way.put(torch.tensor([0.5, 0.0, 3.0], dtype=torch.float64))):
        with way.active():
            assert torch.autograd.gradcheck(
                lambda s, w=weight: dk.feature_match_loss(s, teacher, w, normalize=normalize, reduction=reduction),
                (student,),
                fast_mode=way.name == "triton",  # interpreted, whose every call takes milliseconds
            )
