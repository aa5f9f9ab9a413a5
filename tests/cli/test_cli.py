"""The command line: exit codes, one line for each mistake, nothing half-written."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest

from debiaskd.cli import entry as cli


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["nonsense"], "'nonsense'"),
        (["quickstart", "--sede", "3"], "--sede"),
        (["quickstart", "--seeds", "0"], "must be an integer >= 1, got '0'"),
        (["quickstart", "--seeds", "many"], "must be an integer >= 1, got 'many'"),
        (["doctor", "--loud"], "--loud"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_benchmark_of_an_unknown_op(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "nonsense"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert err.count("\n") == 1
    assert "'nonsense'" in err
    assert "feature_match" in err


def test_unknown_backend_in_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEBIASKD_BACKEND", "fortran")
    code, _, err = run(capsys, "doctor")
    assert code == 2
    assert err.count("\n") == 1
    assert "DEBIASKD_BACKEND" in err
    assert "'fortran'" in err


def test_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(options: object) -> None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")

    monkeypatch.setitem(cli._COMMANDS, "quickstart", missing)
    code, _, err = run(capsys, "quickstart")
    assert code == 2
    assert "sklearn" in err
    assert "pip install 'debiaskd[train]'" in err


def test_a_missing_module_of_our_own_is_a_bug_and_not_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: object) -> None:
        raise ModuleNotFoundError("No module named 'debiaskd.nothing'", name="debiaskd.nothing")

    monkeypatch.setitem(cli._COMMANDS, "doctor", broken)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["doctor"])


def test_full_disk_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results.json")

    monkeypatch.setitem(cli._COMMANDS, "quickstart", full)
    code, _, err = run(capsys, "quickstart")
    assert (code, err) == (2, "debiaskd: results.json: No space left on device\n")


def test_output_directory_that_is_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the quickstart needs the train extra")
    target = tmp_path / "file"
    target.write_text("mine")
    code, _, err = run(capsys, "quickstart", "--out", str(target))
    assert code == 2
    assert err.strip().count("\n") == 0
    assert str(target) in err
    assert target.read_text() == "mine"


def test_output_directory_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the quickstart needs the train extra")
    locked = Path("/proc/1/nothing") if os.geteuid() == 0 else tmp_path / "locked"  # root writes everywhere else
    if os.geteuid() != 0:
        locked.mkdir(mode=0o500)
    code, _, err = run(capsys, "quickstart", "--out", str(locked / "out"))
    assert code == 2
    assert err.count("\n") == 1
    assert str(locked) in err


def test_doctor_names_every_op_and_backend(capsys: pytest.CaptureFixture[str]) -> None:
    from debiaskd.ops import backend

    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for name in (*backend.IMPLEMENTATIONS, *backend.BACKENDS[1:]):
        assert name in out
    chosen = backend.choose("feature_match", __import__("torch").empty(0))
    assert re.search(rf"feature_match\s+{chosen}\n", out)


@pytest.mark.xdist_group("processes")
def test_interrupt_leaves_no_results_and_exits_130(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the quickstart needs the train extra")
    out = tmp_path / "out"
    process = processes.Process("-m", "debiaskd.cli", "quickstart", "--out", out, "--seeds", "1")
    try:
        process.wait_for("stderr", " % ")
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)
        code, _, err = process.wait()
    finally:
        process.kill()
    assert code == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "debiaskd: stopped"
    assert not out.exists() or {path.name for path in out.iterdir()} <= {"data", "runs", "stages"}


def test_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m debiaskd.cli doctor | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("debiaskd ")
    assert done.stderr == ""
