"""csrc/common, called directly, against NumPy and exact fractions."""

import math
from fractions import Fraction

import native_build
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(not native_build.COMPILER, reason="needs g++")

ENERGY, L1, PPCE, RRR = range(4)
sizes = st.integers(1, 2**40)
numbers = st.floats(-1e6, 1e6)
sums = st.floats(0, 1e30)


@pytest.fixture(scope="module")
def common():
    return native_build.module("common")


# ---- bilinear interpolation ----


@given(st.integers(1, 60), st.integers(1, 60))
def test_taps_are_the_weights_of_linear_interpolation(common, old, new):
    source = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    values = np.random.default_rng(0).normal(size=old)
    taps = [common.bilinear_tap(i, new, old) for i in range(new)]
    found = [(1 - weight) * values[low] + weight * values[high] for low, high, weight in taps]
    np.testing.assert_allclose(found, np.interp(source, np.arange(old), values), rtol=1e-12, atol=1e-12)


@given(sizes, sizes, st.data())
def test_taps_stay_inside_and_their_weights_are_shares(common, old, new, data):
    output = data.draw(st.integers(0, new - 1))
    low, high, weight = common.bilinear_tap(output, new, old)
    assert 0 <= low <= high <= old - 1
    assert high - low == (1 if low < old - 1 else 0)
    assert weight >= 0
    assert weight < 1 or low == high  # behind the last cell's centre both taps are that cell
    if output + 1 < new:
        following = common.bilinear_tap(output + 1, new, old)
        assert (following[0], following[2]) >= (low, weight)


@given(sizes)
def test_taps_of_the_same_size_change_nothing(common, size):
    for output in {0, size // 2, size - 1}:
        low, _, weight = common.bilinear_tap(output, size, size)
        # At 2^40 cells and more the half that is added and taken away again is rounded.
        assert (low, weight) == (output, 0)


# ---- losses of a map ----


def expected_loss(kind, everything, inside, area, pixels):
    """(loss, factor inside, factor outside) in exact arithmetic, as methods.md has them."""
    everything, inside, area, pixels = map(Fraction, (everything, inside, area, pixels))
    if kind == ENERGY:
        if everything < Fraction(1e-7):
            return 1 - inside, Fraction(-1), Fraction(0)
        return 1 - inside / everything, -(everything - inside) / everything**2, inside / everything**2
    if kind == L1:
        return everything / pixels, 1 / pixels, 1 / pixels
    if kind == PPCE:
        return (everything / area, -1 / area, Fraction(0)) if area else (Fraction(0),) * 3
    return everything, Fraction(0), Fraction(2)


@given(st.sampled_from(range(4)), st.floats(0, 1e18), st.floats(0, 1), st.integers(0, 2**32), st.integers(1, 2**32))
def test_loss_and_factors_are_those_of_exact_arithmetic(common, kind, everything, share, area, pixels):
    inside = everything * share
    found = common.map_loss(kind, everything, inside, area, pixels)
    exact = expected_loss(kind, everything, inside, area, pixels)
    for name, f, e in zip(("loss", "inside", "outside"), found, exact):
        # A difference of two shares near 1: rounding is relative to 1, or to 1 / everything.
        unit = abs(e) if kind != ENERGY else max(abs(e), 1 if name == "loss" else 1 / max(Fraction(everything), 1))
        if kind == ENERGY and name != "loss" and Fraction(1e-7) <= Fraction(everything) < 1:
            unit = 1 / Fraction(everything)
        assert abs(Fraction(f) - e) <= Fraction(1e-15) * 2 * unit, (name, f, float(e))


@given(st.floats(1e-6, 1e6), st.floats(0, 1), st.floats(1e-4, 1))
def test_factors_of_energy_are_its_derivative(common, everything, share, step):
    # One more unit of positive attribution inside, or outside: the loss is a fraction, its difference exact.
    everything, inside = Fraction(everything), Fraction(everything * share)
    assume(inside <= everything)
    h = Fraction(step) * everything * Fraction(1, 10**9)
    _, of_inside, of_outside = common.map_loss(ENERGY, float(everything), float(inside), 0, 1)
    before = 1 - inside / everything
    tolerance = Fraction(1, 10**8) / everything
    assert abs((1 - (inside + h) / (everything + h) - before) / h - Fraction(of_inside)) <= tolerance
    assert abs((1 - inside / (everything + h) - before) / h - Fraction(of_outside)) <= tolerance


# ---- gradient of a pixel ----


@given(
    st.sampled_from(range(4)),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.booleans(),
    numbers,
    numbers,
)
def test_pixel_gradient_follows_its_definition_in_both_precisions(common, kind, pixel, covered, inside, outside):
    factor = inside if covered else outside
    if kind == ENERGY:
        expected = factor if pixel > 0 else 0
    elif kind == L1:
        expected = factor * np.sign(pixel - covered)
    elif kind == PPCE:
        expected = factor / pixel if covered and pixel > math.exp(-100) else 0
    else:
        expected = factor * pixel
    assert common.pixel_gradient(kind, pixel, covered, inside, outside) == pytest.approx(expected, rel=1e-15)
    if abs(expected) < 3e38:
        found = common.pixel_gradient_float(kind, pixel, covered, inside, outside)
        assert found == pytest.approx(expected, rel=3e-7, abs=2e-45)


@pytest.mark.parametrize("kind", (ENERGY, L1, PPCE, RRR))
@pytest.mark.parametrize("covered", (False, True))
def test_pixels_of_zero_have_a_finite_gradient(common, kind, covered):
    assert math.isfinite(common.pixel_gradient(kind, 0.0, covered, 0.5, -0.25))


@given(st.sampled_from((ENERGY, L1, RRR)), sums)
def test_no_boxes_and_no_energy_give_finite_losses(common, kind, everything):
    for values in ((0, 0, 0, 1), (everything, 0, 0, 1), (everything, everything, 1, 1)):
        assert all(map(math.isfinite, common.map_loss(kind, *values)[:1]))
    assert common.map_loss(PPCE, 0, 0, 0, 1) == (0, 0, 0)
