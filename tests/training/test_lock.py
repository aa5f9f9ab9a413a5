"""One process at a time trains in a folder."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import processes
import pytest

from debiaskd.utils.files import Lock

pytest.importorskip("fcntl", reason="no record locks here")
pytestmark = pytest.mark.xdist_group("processes")

HOLDER = """
import os, sys, time
from pathlib import Path
from debiaskd.utils.files import Lock
lock = Lock(Path(sys.argv[1]))
if sys.argv[2:] and os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("forked", [[], ["forked"]])
def test_the_system_releases_it_when_the_process_is_killed(tmp_path: Path, forked: list[str]) -> None:
    path = tmp_path / ".lock"
    holder = processes.Process("-c", HOLDER, path, *forked, session=True)
    try:
        holder.wait_for("stdout", "held\n")
        with pytest.raises(BlockingIOError):
            Lock(path)
        holder.kill()
        Lock(path).release()  # although a process that it forked still lives
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)


def test_it_is_taken_again_after_release(tmp_path: Path) -> None:
    Lock(tmp_path / ".lock").release()
    lock = Lock(tmp_path / ".lock")
    lock.release()
    lock.release()
    Lock(tmp_path / "nowhere" / ".lock").release()  # what cannot be written keeps nobody out


def test_training_where_another_process_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("lightning_fabric", "jsonargparse", "timm"):
        pytest.importorskip(name)
    import training_runs as runs
    from cli_runs import command

    data = runs.birds(tmp_path)
    recipe, run = runs.write(tmp_path / "plain.yaml", data, runs.PLAIN), tmp_path / "run"
    assert command(capsys, "train", recipe, "--out", run)[0] == 0
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.name != ".lock")
    holder = processes.Process("-c", HOLDER, run / ".lock")
    try:
        holder.wait_for("stdout", "held\n")
        code, out, err = command(capsys, "train", recipe, "--out", run, "--compute.log_every", "7")
        message = f"debiaskd: {run}: another process is training here; wait for it, or choose another --out"
        assert (code, out, err.splitlines()[-1]) == (2, "", message)
        assert sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*") if p.name != ".lock") == before
    finally:
        holder.kill()
    assert command(capsys, "train", recipe, "--out", run)[0] == 0
