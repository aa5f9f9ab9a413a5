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
import time
from collections.abc import Callable, Mapping
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
        session: whether it leads a session, so that one signal reaches it and all that it starts.
    """

    def __init__(self, *arguments: object, environment: Mapping[str, str] | None = None, session: bool = False) -> None:
        self._folder = Path(tempfile.mkdtemp())
        words, variables = [str(argument) for argument in arguments], {**os.environ, **(environment or {})}
        target = (words, variables, str(self._folder), session)
        self._process = _context().Process(target=_main, args=target)
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


def run(*arguments: object, environment: Mapping[str, str] | None = None) -> Finished:
    """`python ARGUMENTS` from beginning to end."""
    return Process(*arguments, environment=environment).wait()


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
    _context()
    torch.multiprocessing.start_processes(function, arguments, nprocs=ranks, start_method="forkserver")


def _context() -> Any:
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # where the server finds what it preloads
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _main(arguments: list[str], environment: dict[str, str], folder: str, session: bool) -> None:
    if session:
        os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        with open(f"{folder}/{name}", "w") as file:
            os.dup2(file.fileno(), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what runs in the background
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
