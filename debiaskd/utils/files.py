"""Files that are whole or not there, and that are still there after the power was cut."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

#: Names that begin so are of files still being written.
TEMPORARY = ".unfinished-"


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """`fill` writes another file, which gets its name once all of it is on the disk.

    Raises:
        OSError: it cannot be written; what was there before still is. Names `path`'s folder.
    """
    unfinished = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        fill(unfinished)
        sync(unfinished)
        os.replace(unfinished, path)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    sync(path.parent)


def probe(path: Path) -> None:
    """Whether `path` could be written, for work that is long and writes at its end; makes the folder that it lies in.

    Raises:
        OSError: it cannot, or is a folder. Names it.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    unfinished = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
    except FileExistsError:  # a file where a folder should be
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    unfinished.unlink()


class Lock:
    """A file that one process at a time holds, until `release` or its end, however that comes.

    A POSIX record lock: unlike those of `flock`, processes forked from the holder do not go on holding it. Within one
    process it keeps nobody out. Where there are no locks, or nothing can be written, it does nothing.

    Args:
        path: of the file, which is made and stays; its folder exists.

    Raises:
        BlockingIOError: another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[str] | None = None
        try:
            import fcntl

            self._file = open(path, "a")  # noqa: SIM115  # held beyond this function
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            return
        except OSError as error:
            self.release()
            if path.exists() and error.errno in (errno.EACCES, errno.EAGAIN) and os.access(path, os.W_OK):
                raise BlockingIOError(errno.EAGAIN, "another process holds it", str(path)) from None

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def write_json(path: Path, document: Any) -> None:
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    def fill(unfinished: Path) -> None:
        unfinished.write_text(text, encoding="utf-8")

    write(path, fill)


def read_json(path: Path) -> Any:
    """None if there is no such file.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems cannot for folders; a full disk must be heard of
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        with suppress(OSError):
            os.close(descriptor)
