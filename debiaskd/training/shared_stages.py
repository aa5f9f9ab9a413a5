"""Stages that several runs share, found by what they are made from.

    STAGES/teacher-3f9a0c5e7b12/          the stage's files, with stage.json once it is finished
    STAGES/.teacher-3f9a0c5e7b12.lock     locked by the process that makes it

A stage that is missing is made in this folder by the first run that needs it, while other runs wait. Its files are
then linked into the folder of every run that uses it (copied where the file system has no hard links), so that a run
is complete by itself and can be moved. A stage that was interrupted is continued by the next run that needs it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from debiaskd.utils import files

#: Seconds between two attempts to lock a stage that another process makes.
INTERVAL = 1.0
#: Of a fingerprint, in the name of a stage's folder.
DIGITS = 12


class SharedStages:
    """A folder of stages.

    Args:
        folder: made when the first stage is.
        write: whether this process is the one that writes.
        broadcast: gives every process the value of the one that writes.
        news: called once with a line of text before this process waits for another.
    """

    def __init__(
        self,
        folder: Path,
        *,
        write: bool = True,
        broadcast: Callable[[Any], Any] = lambda value: value,
        news: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.folder, self.write, self.broadcast, self.news = folder, write, broadcast, news

    def place(self, name: str, fingerprint: str) -> Path:
        """The folder of a stage."""
        return self.folder / f"{name}-{fingerprint[:DIGITS]}"

    def of_name(self, name: str) -> list[Path]:
        """The folders of all stages of a name."""
        return sorted(self.folder.glob(f"{name}-{'?' * DIGITS}"))

    @contextmanager
    def locked(self, place: Path) -> Iterator[None]:
        """Nobody else makes the stage in `place` meanwhile; waits for a process that does.

        Raises:
            OSError: the folder cannot be made.
        """
        lock, told = None, False
        if self.write:
            self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            if self.write:
                try:
                    lock = files.Lock(self.folder / f".{place.name}.lock")
                except BlockingIOError:
                    lock = None
            if self.broadcast(lock is not None):
                break
            if not told:
                self.news(f"waits for another process, which makes {place}")
                told = True
            time.sleep(INTERVAL)
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def link(self, place: Path, target: Path) -> None:
        """Put the files of a finished stage into a run's folder: all of them, or none.

        Raises:
            OSError: they can be neither linked nor copied.
        """
        if self.write:
            unfinished = target.with_name(f"{files.TEMPORARY}{target.name}")
            if unfinished.exists():
                shutil.rmtree(unfinished)
            shutil.copytree(place, unfinished, copy_function=_link, ignore=_unfinished)
            if target.is_dir():  # empty: what a run has begun is finished there
                target.rmdir()
            unfinished.rename(target)
            files.sync(target.parent)
        self.broadcast(True)  # the others read it afterwards


def begun(folder: Path) -> bool:
    """Whether a run has files of a stage in its own folder."""
    return folder.is_dir() and any(folder.iterdir())


def _unfinished(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(files.TEMPORARY)]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
