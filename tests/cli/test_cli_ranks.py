"""Several processes: one line for each that fails, whatever stopped it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("timm")

import training_runs as runs


def test_one_process_is_refused_and_the_other_loses_it(tmp_path: Path) -> None:
    recipe = runs.write(tmp_path / "r.yaml", runs.birds(tmp_path), {**runs.PLAIN, "student": {"name": "small/4"}})
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "a.tex").write_text("mine")  # only the first process writes, and looks
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "debiaskd.cli", "train", str(recipe), "--out", str(thesis)]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    ours = [[line for line in err.splitlines() if line.startswith("debiaskd: ")] for err in said]
    assert ours == [
        [f"debiaskd: rank 0: {thesis}: is neither empty nor a run's folder; choose another --out"],
        ["debiaskd: rank 1: another process has stopped, for a reason that it says; started again, train goes on"],
    ], said
    assert not any("Traceback" in err for err in said)
    assert [process.returncode for process in started] == [2, 1]
