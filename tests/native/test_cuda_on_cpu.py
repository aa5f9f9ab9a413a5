"""The tool that runs CUDA sources on the CPU: right results from right kernels, and planted bugs that it must catch."""

import os
import subprocess
import sys

import cuda_on_cpu
import native_build
import pytest
import torch
from split_calls import CALLS

import debiaskd as dk
from debiaskd.ops import backend

pytestmark = [
    pytest.mark.xdist_group("cuda_on_cpu"),
    pytest.mark.cuda_on_cpu,
    pytest.mark.skipif(not native_build.COMPILER, reason="needs g++"),
]


@pytest.mark.parametrize("name", [name for name in CALLS if "cuda" in backend.IMPLEMENTATIONS[name.split(",")[0]]])
def test_results_are_right_at_any_number_of_multiprocessors_and_do_not_depend_on_the_order_of_blocks(name):
    with dk.backend("eager"):
        exact = CALLS[name](torch.float64)
    for processors in cuda_on_cpu.PROCESSORS:
        found = []
        for seed in (0, 1):
            with cuda_on_cpu.active(processors, seed):
                found.append(CALLS[name](torch.float32))
        for one, other, right in zip(*found, exact):
            assert torch.equal(one, other)
            torch.testing.assert_close(one.double(), right, rtol=1e-5, atol=1e-6 * float(right.abs().max()))


def test_blocks_run_in_an_order_of_their_own(planted):
    assert sorted(planted.order(64)) == list(range(64))
    assert planted.order(64) != planted.order(64)


@pytest.mark.parametrize(
    ("blocks", "threads", "message"),
    [(1, 48, "whole warps"), (1, 2048, "up to 1024 threads, got 2048"), (2**31, 32, "got 2147483648")],
)
def test_launch_past_what_the_hardware_takes_is_an_error(planted, blocks, threads, message):
    with pytest.raises(RuntimeError, match=message):
        planted.empty(blocks, threads, 0)


def test_launch_with_more_shared_memory_than_a_block_can_have_is_an_error(planted):
    planted.empty(1, 32, 83 * 1024)
    with pytest.raises(RuntimeError, match="got 84993"):
        planted.empty(1, 32, 83 * 1024 + 1)


@pytest.fixture(scope="module")
def planted():
    return native_build.module("planted")


@pytest.mark.parametrize("threads", (32, 96, 256, 1024))
def test_block_sum_is_right_in_every_block(planted, threads):
    assert planted.sums([float(i) for i in range(500)], 3, threads) == [500 * 499 / 2] * 3


def test_missing_barrier_gives_wrong_numbers(planted):
    # Blocks run their threads in ascending and in descending order, turn about: one of the two must go wrong.
    for _ in range(2):  # whichever it begins with
        for values in ([1.0] * 256, [float(i) for i in range(300)]):
            assert planted.racing_sums(values, 2, 256) != [sum(values), 2 * sum(values)]
        planted.sums([1.0], 1, 32)


def test_barrier_that_some_threads_never_reach_is_an_error_and_leaves_the_tool_usable(planted):
    with pytest.raises(RuntimeError, match=r"at __syncthreads 0 1 2 .*; returned 16 17 18 "):
        planted.half_barrier()
    assert planted.sums([1.0, 2.0], 1, 64) == [3.0]


def test_shuffle_whose_mask_names_absent_lanes_is_an_error(planted):
    with pytest.raises(RuntimeError, match="in a warp's exchange 0 1"):
        planted.half_shuffle()
    assert planted.sums([1.0, 2.0], 1, 64) == [3.0]


def test_store_for_device_memory_that_meets_shared_memory_is_an_error(planted):
    # On a GPU it would go to another place, or nowhere.
    assert planted.wrong_memory(0) == [0.0] * 32
    with pytest.raises(RuntimeError, match="thread 0 stores to shared memory with an instruction for device memory"):
        planted.wrong_memory(1)


def test_votes_and_shifts_are_those_of_the_hardware(planted):
    # A lane without a neighbour below or above gets its own value.
    differences = [1, *[2] * 30, 1]
    assert planted.vote() == [0xAAAAAA00 | difference for difference in differences]


def run_sanitized(call):
    """In a process of its own, since what is found ends it."""
    path = native_build.build("planted.so", sanitized=True)
    libraries = [
        subprocess.run(
            [native_build.COMPILER, f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return subprocess.run(
        [sys.executable, "-c", f"import planted; print(planted.{call})"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(path.parent),
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONMALLOC": "malloc",
        },
    )


@pytest.mark.parametrize("call", ("write(0)", "write_shared(0)", "misaligned(4)", "sums([1.0], 2, 64)"))
def test_right_kernels_pass_the_sanitizers(call):
    done = run_sanitized(call)
    assert done.returncode == 0, done.stderr
    assert "1.0" in done.stdout or "0.0" in done.stdout


@pytest.mark.parametrize(
    ("call", "finding"),
    [
        ("write(1)", "heap-buffer-overflow"),
        ("write(-1)", "heap-buffer-overflow"),
        ("write_shared(1)", "out of bounds|global-buffer-overflow"),
        ("misaligned(1)", "misaligned address"),
    ],
)
def test_planted_accesses_are_caught(call, finding):
    done = run_sanitized(call)
    assert done.returncode != 0
    assert any(f in done.stderr for f in finding.split("|")), done.stderr
