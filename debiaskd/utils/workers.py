"""Run jobs in worker processes, several at a time.

Worker processes are spawned. They use one thread of PyTorch each, do not import the calling script, which needs no
`if __name__ == "__main__"`, ignore Ctrl-C, which reaches the process that started them, and end when that one ends.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import SpawnProcess
from types import ModuleType
from typing import Any

import torch

#: Seconds that a worker has to clean up after it was told to stop.
GRACE = 10.0


class WorkerError(RuntimeError):
    """A worker process ended without a result."""


class _StoppedError(BaseException):
    """Raised in a worker that is told to stop; not an `Exception`, so that no job handles it."""


@dataclass(frozen=True)
class Job:
    """A call of a function.

    Attributes:
        key: names the job; a tuple of strings and numbers, for example.
        function: called as `function(*arguments, tell=...)`, where `tell(news)` sends an object to the process that
            started the workers. It can be pickled, as can its arguments, its news and its result.
        arguments: see above.
        after: key of the job that has to be done before; None: none.
    """

    key: Any
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    after: Any = None


def cores() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    *,
    begun: Callable[[Any], None] = lambda key: None,
    news: Callable[[Any, Any], None] = lambda key, news: None,
    ended: Callable[[Any], None] = lambda key: None,
) -> dict[Any, Any]:
    """Run jobs and return their results by key.

    A free worker takes the first job whose predecessor is done. With one worker the jobs run in this process, with one
    thread of PyTorch, so that results do not depend on the number of workers.

    Args:
        jobs: in the order in which they should begin; a job comes after its predecessor.
        workers: number of processes, >= 1.
        begun, ended: called in this process with the key of a job that begins or ends.
        news: called in this process with the key of a job and what it tells.

    Raises:
        ValueError: a job whose predecessor does not come before it.
        WorkerError: a worker was killed.
        Exception: what a job, `begun`, `news` or `ended` raised. All workers have ended by then.

    Example:
        >>> def square(number, tell):
        ...     tell(f"squaring {number}")
        ...     return number**2
        >>> jobs = [Job("a", square, (3,)), Job("b", square, (4,), after="a")]
        >>> run_jobs(jobs, 1, news=lambda key, news: print(key, news))
        a squaring 3
        b squaring 4
        {'a': 9, 'b': 16}
    """
    keys: set[Any] = set()
    for job in jobs:
        if job.after is not None and job.after not in keys:
            raise ValueError(f"jobs must come after their predecessors, got {job.key!r} before {job.after!r}")
        keys.add(job.key)
    workers = min(workers, len(jobs))
    if workers > 1:
        return _Pool(jobs, begun, news, ended).run(workers)
    results: dict[Any, Any] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for job in jobs:
            begun(job.key)
            results[job.key] = job.function(*job.arguments, tell=lambda value, key=job.key: news(key, value))
            ended(job.key)
    finally:
        torch.set_num_threads(threads)
    return results


class _Pool:
    """Worker processes, each with a pipe through which it gets jobs and sends news, warnings and results."""

    def __init__(
        self,
        jobs: Sequence[Job],
        begun: Callable[[Any], None],
        news: Callable[[Any, Any], None],
        ended: Callable[[Any], None],
    ) -> None:
        self.waiting, self.total = list(jobs), len(jobs)
        self.begun, self.news, self.ended = begun, news, ended
        self.results: dict[Any, Any] = {}
        self.processes: list[SpawnProcess] = []
        self.running: dict[connection.Connection[Any, Any], Job | None] = {}

    def run(self, workers: int) -> dict[Any, Any]:
        try:
            for _ in range(workers):
                self._start()
            while len(self.results) < self.total:
                self._assign()
                for pipe in connection.wait([pipe for pipe, job in self.running.items() if job is not None]):
                    assert isinstance(pipe, connection.Connection)
                    self._receive(pipe)
            return self.results
        finally:
            self._stop()

    def _start(self) -> None:
        context = get_context("spawn")  # a fork would inherit torch's threads and their locks
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,))
        with main_hidden(), interrupts_blocked():
            process.start()
        theirs.close()  # so that a killed worker is noticed as the end of its pipe
        self.processes.append(process)
        self.running[ours] = None

    def _assign(self) -> None:
        for pipe, current in self.running.items():
            job = next((job for job in self.waiting if job.after is None or job.after in self.results), None)
            if current is None and job is not None:
                self.waiting.remove(job)
                self.running[pipe] = job
                self.begun(job.key)
                with suppress(BrokenPipeError):  # noticed when its answer is read
                    pipe.send(job)

    def _receive(self, pipe: connection.Connection[Any, Any]) -> None:
        job = self.running[pipe]
        assert job is not None
        try:
            kind, value = pipe.recv()
        except (EOFError, ConnectionResetError):
            message = f"the worker process of {job.key} was killed, perhaps for want of memory: try fewer workers"
            raise WorkerError(message) from None
        if kind == "news":
            self.news(job.key, pickle.loads(value))
        elif kind == "warning":
            warnings.warn_explicit(*value)
        elif kind == "result":
            self.results[job.key] = pickle.loads(value)
            self.running[pipe] = None
            self.ended(job.key)
        else:
            error, text = value
            error.__cause__ = WorkerError(f"in a worker process:\n{text}")
            raise error

    def _stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(GRACE)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self.running:
            pipe.close()


@contextmanager
def main_hidden() -> Iterator[None]:
    """Hide the main module from processes that are spawned within, which would import it, and so run a script that has
    no main guard again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C in processes that start within, even before they can ignore it; in this process it is delayed."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker() -> None:
    """Set up a worker process: one thread, no Ctrl-C, and an end when the process that started it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _work(pipe: connection.Connection[Any, Any]) -> None:
    """The main function of a worker of `_Pool`."""
    begin_worker()
    signal.signal(signal.SIGTERM, _raise_stopped)  # so that temporary files are removed

    def send(kind: str, value: Any) -> None:
        pipe.send((kind, value))

    def warn(message: Warning | str, category: type[Warning], filename: str, line: int, *rest: Any) -> None:
        send("warning", (str(message), category, filename, line))

    warnings.showwarning = warn  # type: ignore[assignment]
    with suppress(_StoppedError, EOFError):
        while True:
            job = pipe.recv()
            try:
                # Pickled here, because a pipe would pass tensors as shared memory, which ends with this process.
                result = pickle.dumps(job.function(*job.arguments, tell=lambda news: send("news", pickle.dumps(news))))
            except Exception as error:
                send("error", (_sendable(error), traceback.format_exc()))
            else:
                send("result", result)


def _raise_stopped(number: int, frame: Any) -> None:
    raise _StoppedError


def _sendable(error: Exception) -> Exception:
    """The error, or one with its text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return WorkerError(f"{type(error).__name__}: {error}")
    return error
