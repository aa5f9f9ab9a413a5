"""bench/gpu.sh runs from end to end without a GPU, so that a GPU's minutes are not spent on its mistakes."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import processes
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"

pytestmark = pytest.mark.xdist_group("processes")


def run(out: Path, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", SCRIPT, out], env={**os.environ, **settings}, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interpreter")


def test_a_dry_run_goes_through_every_part(tmp_path: Path, folder: Path) -> None:
    # One part by a Python that imports what the script has put together.
    with processes.interpreter(folder, real="'-m debiaskd.cli '*") as python:
        settings = {"GPU_DRY_RUN": "1", "GPU_SECONDS": "4800", "PYTHON": str(python)}
        done = run(tmp_path, settings)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "gpu.log").read_text()
    finished = re.findall(r"^== (\S+): done in", log, re.MULTILINE)
    parts = ["build", "doctor", "gpu-tests", "each-dtype", "bench-feature_match", "bench-localization", "calls"]
    assert finished == [*parts, "guidance"]
    assert set(re.findall(r"compiler (\S+)", log)) == {"-gencode=arch=compute_90,code=sm_90"}
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == 3, files
    results = json.loads((tmp_path / files[0]).read_text())
    assert {case["op"] for case in results["cases"]} == {"feature_match", "localization"}
    guided = json.loads(next(tmp_path.glob("guidance-*.json")).read_text())
    assert [found["model"] for found in guided["results"]] == ["test_resnet"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run all that it runs with a GPU")
def test_it_says_in_one_line_that_there_is_no_gpu(tmp_path: Path, folder: Path) -> None:
    with processes.interpreter(folder) as python:
        done = run(tmp_path, {"PYTHON": str(python)})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "bench/gpu.sh: PyTorch finds no CUDA device here"
