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
every_target = pytest.mark.parametrize(
    ("op", "target"),
    [pytest.param(op, target, marks=pytest.mark.xdist_group("triton_compile")) for op in CASES for target in TARGETS],
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


@every_target
def test_launches_are_no_more_than_promised(compiled, op, target):
    made = {case: tuple(launch["kernel"] for launch in launches) for case, launches in compiled[target][op].items()}
    assert made == {case: CASES[op][case].launches for case in cases_of(op, target)}


@every_target
def test_aligned_elements_move_16_bytes_at_once_by_addresses_of_64_bits(compiled, op, target):
    for case, launches in compiled[target][op].items():
        for launch in launches:
            loads, stores = CASES[op][case].wide.get(launch["kernel"], (0, 0))
            assert launch["loads"] >= loads, (case, launch)
            assert launch["stores"] >= stores, (case, launch)
            assert not launch["narrow"], (case, launch["kernel"])


@every_target
def test_no_product_is_rounded_to_tf32_and_registers_suffice(compiled, op, target):
    for case, launches in compiled[target][op].items():
        for launch in launches:
            assert not launch["tf32"], (case, launch["kernel"])
            if VERSION >= (3, 9):  # older compilers spill a few bytes here and there
                assert launch["spilled"] <= CASES[op][case].aside.get(launch["kernel"], 0), (case, launch)


def test_no_kernel_is_left_out():
    launched = {
        name
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"\blaunch\(\s*(_\w+)", path.read_text())
    }
    assert launched
    assert launched == {name for op in OPS for case in cases_of(op).values() for name in case.launches}
