"""What the Triton kernels share: layouts, tiles, long numbers, sums, and schemas that are those of the C++ ops."""

import importlib.util

import pytest
import torch
from cases import feature_match_oracle, normal, uniform
from hypothesis import given
from hypothesis import strategies as st

import debiaskd as dk
from debiaskd.ops import backend

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from debiaskd.kernels import layout as layouts
from debiaskd.kernels.layout import MOST_PARTS, SHORT

interpreted = pytest.mark.skipif(not backend.INTERPRETED, reason="runs on the CPU, in Triton's interpreter")


# ---- layouts ----


@given(st.integers(1, 2**33), st.integers(1, 2**33))
def test_programs_cover_all_elements_and_leave_few_sums_a_sample(samples, elements):
    layout = layouts.Layout(samples, elements)
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
    student, teacher = (normal(3, 5, 40, 41, seed=i) for i in range(2))
    op = torch.ops.debiaskd_triton.feature_match
    expected = op(student, teacher, uniform(3), normalize, 1, True)
    monkeypatch.setattr(layouts, "SHORT", 0)
    for a, e in zip(op(student, teacher, uniform(3), normalize, 1, True), expected):
        assert torch.equal(a, e)


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
