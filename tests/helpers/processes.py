"""Python processes that start in milliseconds: forked from a server that has imported the large packages once.

    done = processes.run("-m", "debiaskd.cli", "doctor")
    done.returncode, done.stdout, done.stderr

as `subprocess.run([sys.executable, ...])` would, which takes seconds for its imports alone. Where imports are tested,
or a variable that is read when a module is imported, a process of subprocess is needed. Linux and macOS.

Tests that use it are marked `xdist_group("processes")`, so that one worker of pytest-xdist starts one server.
"""

from __future__ import annotations

import atexit
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch.multiprocessing

PRELOADED = ["pytest", "debiaskd.cli.entry", "training_runs", "distributed_metrics", "lightning_fabric", "timm"]


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Process:
    """A process that runs `python ARGUMENTS`: `-m MODULE ...`, `-c PROGRAM ...` or `SCRIPT ...`.

    Args:
        environment: variables besides those of this process.
        folder: where it runs; None: where this process does.
        session: whether it leads a session, so that one signal reaches it and all that it starts.
    """

    def __init__(
        self,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        session: bool = False,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp())
        words, variables = [str(argument) for argument in arguments], {**os.environ, **(environment or {})}
        target = (words, variables, str(folder or Path.cwd()), str(self._folder), session)
        self._process = context().Process(target=_main, args=target)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, file: str, text: str, seconds: float = 60) -> None:
        """Wait until "stdout" or "stderr" holds the text, or the process ends."""
        end = time.monotonic() + seconds
        while text not in self._read(file) and self._process.is_alive():
            assert time.monotonic() < end, f"no {text!r} in {self._read(file)!r}"
            time.sleep(0.01)

    def wait(self, seconds: float = 300) -> Finished:
        """Wait for its end; what it wrote can be had once."""
        try:
            self._process.join(seconds)
            assert self._process.exitcode is not None, f"has not ended: {self._read('stderr')}"
            return Finished(self._process.exitcode, self._read("stdout"), self._read("stderr"))
        finally:
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self, file: str) -> str:
        path = self._folder / file
        return path.read_text() if path.exists() else ""


def run(*arguments: object, **options: Any) -> Finished:
    """`python ARGUMENTS` from beginning to end."""
    return Process(*arguments, **options).wait()


def run_ranks(*arguments: object, ranks: int = 2) -> list[Finished]:
    """`python ARGUMENTS` in processes that meet as those that torchrun starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    started = [
        Process(*arguments, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)
    ]
    try:
        return [process.wait() for process in started]
    finally:
        for process in started:
            process.kill()


def spawn(function: Callable[..., object], *arguments: Any, ranks: int = 2) -> None:
    """torch.multiprocessing.spawn: `function(rank, *arguments)` in as many processes."""
    context()
    torch.multiprocessing.start_processes(function, arguments, nprocs=ranks, start_method="forkserver")


_STAND_IN = """#!/bin/sh
case "$*" in {real}) exec {python} "$@";; esac
call=$(mktemp -d {folder}/call.XXXXXX)
printf '%s\\0' "$@" >"$call/arguments"
env -0 >"$call/environment"
pwd >"$call/folder"
mkfifo "$call/code"
echo "$call" >{folder}/calls
read -r code <"$call/code"
cat "$call/stdout"
cat "$call/stderr" >&2
exit "$code"
"""


@contextmanager
def interpreter(folder: Path, real: str = "") -> Iterator[Path]:
    """An executable for shell scripts that does what `python` would, by `run`.

    Args:
        folder: an empty folder for it and for what goes through it.
        real: a pattern of sh; arguments that match it are given to this process's Python.
    """
    made, calls = folder / "python", folder / "calls"
    made.write_text(_STAND_IN.format(folder=folder, python=sys.executable, real=real or "''"))
    made.chmod(0o755)
    os.mkfifo(calls)

    def serve() -> None:
        with open(os.open(calls, os.O_RDWR)) as requests:  # for writing, too: no end of file between two calls
            for line in requests:
                call = Path(line.rstrip())
                if line == "\n":
                    return
                words = [(call / name).read_text().split("\0")[:-1] for name in ("arguments", "environment")]
                variables = dict(word.split("=", 1) for word in words[1])
                done = run(*words[0], environment=variables, folder=Path((call / "folder").read_text().rstrip()))
                (call / "stdout").write_text(done.stdout)
                (call / "stderr").write_text(done.stderr)
                (call / "code").write_text(f"{done.returncode}\n")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield made
    finally:
        calls.write_text("\n")
        thread.join()


def context() -> Any:
    """The context of multiprocessing whose processes are forked from the server."""
    made = get_context("forkserver")
    made.set_forkserver_preload(PRELOADED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # where the server finds what it preloads
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return made


def _main(arguments: list[str], environment: dict[str, str], folder: str, output: str, session: bool) -> None:
    if session:
        os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(f"{output}/{name}", "w") as file:
            os.dup2(file.fileno(), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what runs in the background
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    first, *rest = arguments
    try:
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(rest[0], {"__name__": "__main__"})
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(first).parent))
            runpy.run_path(first, run_name="__main__")
    finally:
        atexit._run_exitfuncs()
