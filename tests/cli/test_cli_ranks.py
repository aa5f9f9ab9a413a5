"""Several processes: one line for each that fails, whatever stopped it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("timm")

import processes
import training_runs as runs


@pytest.mark.xdist_group("processes")
def test_one_process_is_refused_and_the_other_loses_it(tmp_path: Path) -> None:
    recipe = runs.write(tmp_path / "r.yaml", runs.birds(tmp_path), {**runs.PLAIN, "student": {"name": "small/4"}})
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "a.tex").write_text("mine")  # only the first process writes, and looks
    ended = processes.run_ranks("-m", "debiaskd.cli", "train", recipe, "--out", thesis)
    said = [done.stderr for done in ended]
    ours = [[line for line in err.splitlines() if line.startswith("debiaskd: ")] for err in said]
    assert ours == [
        [f"debiaskd: rank 0: {thesis}: is neither empty nor a run's folder; choose another --out"],
        ["debiaskd: rank 1: another process has stopped, for a reason that it says; started again, train goes on"],
    ], said
    assert not any("Traceback" in err for err in said)
    assert [done.returncode for done in ended] == [2, 1]
