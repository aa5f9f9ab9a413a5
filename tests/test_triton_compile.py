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

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
CASES = {op: cases_of(op) for op in OPS}
every_case = pytest.mark.parametrize(("op", "case"), [(op, case) for op, cases in CASES.items() for case in cases])
every_target = pytest.mark.parametrize("target", TARGETS)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """op -> target -> what tests/triton_compile.py says of its cases; the targets of an op at the same time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))

    def start(op, target):
        command = [sys.executable, str(ROOT / "tests" / "triton_compile.py"), op, target]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    reports = {}
    for op in CASES:
        running = {target: start(op, target) for target in TARGETS}
        reports[op] = {}
        for target, process in running.items():
            output, errors = process.communicate()
            assert process.returncode == 0, f"{op} for {target}: {errors}"
            reports[op][target] = json.loads(output)
    return reports


@every_target
@every_case
def test_launches_are_no_more_than_promised(compiled, op, case, target):
    launches = compiled[op][target][case]
    assert tuple(launch["kernel"] for launch in launches) == CASES[op][case].launches


@every_target
@every_case
def test_aligned_elements_move_16_bytes_at_once(compiled, op, case, target):
    for launch in compiled[op][target][case]:
        loads, stores = CASES[op][case].wide.get(launch["kernel"], (0, 0))
        assert launch["loads"] >= loads, launch
        assert launch["stores"] >= stores, launch


@every_target
@every_case
def test_addresses_have_64_bits(compiled, op, case, target):
    for launch in compiled[op][target][case]:
        assert not launch["narrow"], launch["kernel"]


@every_target
@every_case
def test_registers_suffice(compiled, op, case, target):
    for launch in compiled[op][target][case]:
        assert launch["spilled"] <= CASES[op][case].aside.get(launch["kernel"], 0), launch


def test_no_kernel_is_left_out(compiled):
    launched = {
        name
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"\blaunch\(\s*(_\w+)", path.read_text())
    }
    assert launched
    assert launched == {
        launch["kernel"]
        for targets in compiled.values()
        for cases in targets.values()
        for launches in cases.values()
        for launch in launches
    }
