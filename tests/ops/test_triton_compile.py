"""The Triton kernels, compiled for GPUs that need not be here: launches, 16-byte accesses, addresses, registers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from triton_compile import OPS, TARGETS, cases_of

from debiaskd.ops import backend

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
VERSION = backend.triton_version() if importlib.util.find_spec("triton") else (0, 0)
CASES = {op: cases_of(op) for op in OPS}
# All is compiled together, by whichever process these tests run in.
every_case = pytest.mark.parametrize(
    ("op", "target", "case"),
    [
        pytest.param(op, target, case, marks=pytest.mark.xdist_group("triton_compile"))
        for op in CASES
        for target in TARGETS
        for case in cases_of(op, target)
    ],
)


@pytest.fixture(scope="module")
def compiled():
    """target -> op -> what tests/helpers/triton_compile.py says of its cases; unchanged kernels are compiled once."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "triton_compile.py"), ",".join(TARGETS), *CASES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@every_case
def test_launches_are_no_more_than_promised(compiled, op, case, target):
    launches = compiled[target][op][case]
    assert tuple(launch["kernel"] for launch in launches) == CASES[op][case].launches


@every_case
def test_aligned_elements_move_16_bytes_at_once(compiled, op, case, target):
    for launch in compiled[target][op][case]:
        loads, stores = CASES[op][case].wide.get(launch["kernel"], (0, 0))
        assert launch["loads"] >= loads, launch
        assert launch["stores"] >= stores, launch


@every_case
def test_addresses_have_64_bits(compiled, op, case, target):
    for launch in compiled[target][op][case]:
        assert not launch["narrow"], launch["kernel"]


@every_case
def test_no_product_is_rounded_to_tf32(compiled, op, case, target):
    for launch in compiled[target][op][case]:
        assert not launch["tf32"], launch["kernel"]


@pytest.mark.skipif(VERSION < (3, 9), reason="older compilers spill a few bytes here and there")
@every_case
def test_registers_suffice(compiled, op, case, target):
    for launch in compiled[target][op][case]:
        assert launch["spilled"] <= CASES[op][case].aside.get(launch["kernel"], 0), launch


def test_no_kernel_is_left_out():
    launched = {
        name
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"\blaunch\(\s*(_\w+)", path.read_text())
    }
    assert launched
    assert launched == {name for op in OPS for case in cases_of(op).values() for name in case.launches}
