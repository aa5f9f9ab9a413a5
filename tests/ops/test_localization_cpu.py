"""What the energy loss does on the CPU beyond its formula: loops for each instruction set, stores past the caches."""

import native_build
import numpy as np
import pytest
import torch
from cases import normal, ways
from hypothesis import given
from hypothesis import strategies as st

import debiaskd as dk

cpp = pytest.mark.skipif(not any(way.name == "cpp" for way in ways("localization")), reason="needs the native library")


@pytest.fixture(scope="module")
def rows():
    if not native_build.COMPILER:
        pytest.skip("needs g++")
    return native_build.module("energy_rows")


@given(st.integers(0, 400), st.integers(0, 1000))
def test_loops_of_every_instruction_set_sum_and_mark_alike(rows, length, seed):
    random = np.random.default_rng(seed)
    values = random.normal(size=length).astype(np.float32)
    values[random.random(length) < 0.1] = 0
    covered = (random.random(length) < 0.5).astype(np.int32)
    whole = length // 32 * 32
    _, _, expected_words = rows.add("plain", values, covered)
    positive = values[:whole].astype(np.float64).clip(min=0)
    for loop in rows.loops():
        everything, inside, words = rows.add(loop, values, covered)
        np.testing.assert_allclose(everything, positive.sum(), rtol=1e-6)
        np.testing.assert_allclose(inside, (positive * covered[:whole]).sum(), rtol=1e-6)
        assert words[: whole // 32] == expected_words[: whole // 32]


def test_nan_reaches_the_sums_of_every_loop(rows):
    values, covered = np.ones(64, np.float32), np.ones(64, np.int32)
    values[33] = np.nan
    for loop in rows.loops():
        everything, inside, words = rows.add(loop, values, covered)
        assert np.isnan(everything)
        assert np.isnan(inside)
        assert words == [-1, ~2]


@given(st.integers(0, 300), st.integers(0, 20), st.integers(0, 1000))
def test_rows_that_start_anywhere_are_written_in_full(rows, length, shift, seed):
    random = np.random.default_rng(seed)
    value = random.normal(size=length).astype(np.float32)
    words = random.integers(-(2**31), 2**31, size=(length + 31) // 32).tolist()
    chosen = np.array([words[i // 32] >> (i % 32) & 1 for i in range(length)], dtype=bool)
    np.testing.assert_array_equal(rows.unpack(words, value, shift), np.where(chosen, value, 0))


@cpp
@pytest.mark.parametrize("width", (96, 104, 101))  # rows that start at 64 bytes, at 32, anywhere
def test_gradients_stored_past_the_caches_are_those_of_smaller_batches(width):
    images = 8 * 2**20 // (96 * width * 4) + 2
    maps = normal(images, 96, width)
    boxes = dk.Boxes.from_lists([[[i % 50, 3, 60 + i % 30, 70], [0, 40, 20, 96]] for i in range(images)])

    def gradient(chosen):
        leaf = maps[chosen].clone().requires_grad_()
        with dk.backend("cpp"):
            dk.energy_loss(leaf, boxes[chosen], reduction="sum").backward()
        return leaf.grad

    everything = list(range(images))
    halves = [gradient(everything[: images // 2]), gradient(everything[images // 2 :])]
    assert torch.equal(gradient(everything), torch.cat(halves))
