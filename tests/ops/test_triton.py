"""What the Triton kernels share: layouts, tiles, long numbers, sums, and schemas that are those of the C++ ops."""

import importlib.util
import math

import pytest
import torch
from cases import LAYOUTS, feature_match_oracle, lay_out, normal, uniform
from hypothesis import given
from hypothesis import strategies as st

import debiaskd as dk
from debiaskd.ops import backend

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from debiaskd.kernels import layout as layouts
from debiaskd.kernels.layout import MOST_PARTS, SHORT
from debiaskd.kernels.layout import lay_out as merge

interpreted = pytest.mark.skipif(not backend.INTERPRETED, reason="runs on the CPU, in Triton's interpreter")


# ---- layouts ----


@pytest.mark.parametrize(
    ("student", "teacher", "sizes", "strides"),
    [
        ("contiguous", "contiguous", (60,), [(60, 1), (60, 1)]),
        ("channels_last", "channels_last", (60,), [(60, 1), (60, 1)]),
        ("reversed", "reversed", (60,), [(1, 2), (1, 2)]),
        ("channels_last", "contiguous", (20, 3), [(60, 3, 1), (60, 1, 20)]),
        ("contiguous", "offset", (3, 4, 5), [(60, 20, 5, 1), (693, 99, 11, 1)]),
        ("expanded_batch", "expanded_batch", (60,), [(0, 1), (0, 1)]),
    ],
)
def test_axes_merge_where_all_tensors_run_on(student, teacher, sizes, strides):
    layout = merge([lay_out(normal(2, 3, 4, 5), name) for name in (student, teacher)])
    assert (layout.samples, layout.elements, layout.sizes) == (2, 60, sizes)
    assert list(layout.strides) == strides


def test_samples_that_count_alike_are_one_where_no_gap_parts_them():
    dense, cut = normal(4, 6, 5), normal(4, 6, 5)[:, :5]
    one, many = merge([dense, dense], alike=True), merge([cut, cut], alike=True)
    assert (one.samples, one.sizes) == (1, (120,))
    assert (many.samples, many.sizes) == (4, (25,))
    assert merge([cut, cut[:1].expand(4, 5, 5)], alike=True).samples == 4


@st.composite
def tensors(draw):
    shape = tuple(draw(st.lists(st.sampled_from((1, 2, 3, 4, 8)), min_size=1, max_size=5)))
    numbers = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    dense = tuple(name for name in LAYOUTS if not name.startswith("expanded"))
    return [lay_out(numbers, draw(st.sampled_from(dense))) for _ in range(3)]


@given(tensors(), st.booleans())
def test_layouts_number_the_same_element_alike_in_every_tensor(tensors, alike):
    layout = merge(tensors, alike)
    views = [
        tensor.as_strided((layout.samples, *layout.sizes), strides) for tensor, strides in zip(tensors, layout.strides)
    ]
    assert views[0].flatten().sort().values.tolist() == list(range(tensors[0].numel()))
    assert all(torch.equal(view, views[0]) for view in views)
    if layout.samples > 1:
        first = views[0].flatten(1).sort().values
        assert torch.equal(first, tensors[0].reshape(first.shape))
    vector = layout.options(1)["VECTOR"]
    assert layout.elements % vector == 0
    assert vector == 1 or all(s[-1] == 1 and not any(step % vector for step in s[:-1]) for s in layout.strides)


@given(st.integers(1, 2**33), st.integers(1, 2**33))
def test_programs_cover_all_elements_and_leave_few_sums_a_sample(samples, elements):
    layout = layouts.Layout(samples, elements, (elements,), ((elements, 1),))
    assert layout.parts <= MOST_PARTS
    assert (layout.parts - 1) * layout.steps * layout.cols < elements <= layout.parts * layout.steps * layout.cols
    assert layout.programs * layout.rows >= samples * layout.parts
    assert layout.rows == 1 or layout.parts == layout.steps == 1
    if elements <= SHORT:
        assert layout.parts * layout.steps * layout.cols < 2**31


# ---- kernels ----


@interpreted
@pytest.mark.parametrize("normalize", (False, True))
def test_elements_numbered_in_64_bits_are_the_same(monkeypatch, normalize):
    student, teacher = (lay_out(normal(3, 5, 40, 41, seed=i), name) for i, name in enumerate(("offset", "reversed")))
    op = torch.ops.debiaskd_triton.feature_match
    expected = op(student, teacher, uniform(3), normalize, 1, True)
    monkeypatch.setattr(layouts, "SHORT", 0)
    for a, e in zip(op(student, teacher, uniform(3), normalize, 1, True), expected):
        assert torch.equal(a, e)


@interpreted
@pytest.mark.parametrize("upstream", (torch.tensor(3.0), torch.tensor([1.0, 0.5])), ids=("scalar", "vector"))
@pytest.mark.parametrize("axes", (2, 4, 7))
def test_gradients_with_gaps_are_scaled_in_place_and_their_gaps_left_alone(upstream, axes):
    gradient = lay_out(normal(2, *[3] * (axes - 1)), "stepped")
    expected = gradient * upstream.reshape(-1, *[1] * (axes - 1))
    memory = torch.empty(0).set_(gradient.untyped_storage())
    gaps = memory.isnan().sum()
    torch.ops.debiaskd_triton.feature_match_scale_(gradient, upstream)
    assert torch.equal(gradient, expected)
    assert memory.isnan().sum() == gaps > 0


@interpreted
@pytest.mark.parametrize("upstream", (torch.tensor(1.0), torch.tensor([1.0, 1.0])), ids=("scalar", "vector"))
def test_an_upstream_gradient_of_1_moves_nothing(upstream):
    unusual = torch.tensor(0x7FC1, dtype=torch.int16).expand(2, 300)  # a NaN that none of the kernels would write
    gradient = unusual.clone().view(torch.bfloat16)
    torch.ops.debiaskd_triton.feature_match_scale_(gradient, upstream)
    assert torch.equal(gradient.view(torch.int16), unusual)
    torch.ops.debiaskd_triton.feature_match_scale_(gradient, 2 * upstream)
    assert not torch.eq(gradient.view(torch.int16), unusual).any()


@interpreted
def test_a_sum_that_overflows_is_infinite_and_not_nan():
    student = torch.full((1, 300_000), 1e16)
    with dk.backend("triton"):
        loss = dk.feature_match_loss(student, torch.zeros_like(student), reduction="none")
        assert loss.isfinite()
        loss = dk.feature_match_loss(student * 100, torch.zeros_like(student), reduction="none")
    assert loss.isposinf()


@interpreted
def test_more_weights_than_a_program_adds_up():
    student, teacher, weight = normal(1000, 3), normal(1000, 3, seed=1), uniform(1000)
    loss, gradient = torch.ops.debiaskd_triton.feature_match(student, teacher, weight, False, 1, True)
    for actual, exact in zip((loss, gradient), feature_match_oracle(student, teacher, weight)):
        torch.testing.assert_close(actual, exact.float())


@pytest.mark.skipif("triton" in backend.unavailable, reason="the Triton kernels cannot run here")
@pytest.mark.skipif(not backend.native, reason="the native libraries are not built")
def test_schemas_are_those_of_the_native_ops():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("debiaskd_triton::")]
    assert "debiaskd_triton::feature_match_scale_" in names
    for name in names:
        name = name.removeprefix("debiaskd_triton::")
        native, triton = (getattr(getattr(torch.ops, n), name).default._schema for n in ("debiaskd", "debiaskd_triton"))
        assert signature(triton) == signature(native), name


def signature(schema):
    # torch.library writes SymInt for every int.
    arguments = [(a.name, str(a.type).replace("SymInt", "int"), a.is_write) for a in schema.arguments]
    return arguments, [str(result.type) for result in schema.returns]
