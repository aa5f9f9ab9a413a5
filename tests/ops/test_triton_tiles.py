"""The tiles that Triton kernels have on a GPU, in Triton's interpreter, where other tests have larger ones."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from split_calls import CALLS

from debiaskd.ops import backend

HELPERS = Path(__file__).parents[1] / "helpers"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not backend.INTERPRETED, reason="a GPU runs these tiles in every test"),
    pytest.mark.xdist_group("triton_tiles"),
]


@pytest.fixture(scope="module")
def errors():
    """Of all calls, from one process, because sizes are chosen when kernels are imported."""
    environment = {**os.environ, "DEBIASKD_GPU_TILES": "1", "TRITON_INTERPRET": "1"}
    paths = (str(HELPERS), str(HELPERS.parent), *filter(None, [os.environ.get("PYTHONPATH")]))
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, str(HELPERS / "split_calls.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_right_with_the_tiles_of_a_gpu(errors, name):
    assert max(errors[name]) < 1e-5  # NaN fails too


def test_no_constant_depends_on_the_interpreter_itself():
    from debiaskd.kernels import launch

    kernels = Path(launch.__file__).parent
    sizes = [path.name for path in kernels.glob("*.py") if "if INTERPRETED else" in path.read_text()]
    assert not sizes
