"""The output folder of a data set: locked while it is written, and never shared by two data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from debiaskd.data.packed import shards
from debiaskd.data.sources.records import DataError, Source

_LOCK = ".lock"


@contextmanager
def begun(out: Path, settings: dict[str, Any], source: Source) -> Iterator[None]:
    """`out` exists, is ours alone, and holds either nothing or the beginning of the same thing."""
    out.mkdir(parents=True, exist_ok=True)
    strangers = sorted(p.name for p in out.iterdir() if not p.name.startswith(".") and p.name != "lost+found")
    if strangers and not (out / shards.PLAN).exists():
        raise DataError(f"{out}: holds {strangers[0]!r} and is not a prepared data set; choose another OUT")
    with locked(out):
        try:
            plan = shards.read_json(out / shards.PLAN)
            if not isinstance(plan, (dict, type(None))):
                raise ValueError
        except ValueError:
            raise DataError(f"{out / shards.PLAN}: damaged; choose another OUT or remove this one") from None
        wanted = {
            "format": shards.FORMAT,
            "version": shards.VERSION,
            "options": settings,
            "fingerprint": source.fingerprint(),
        }
        if plan is None:
            writing(out, lambda: shards.write_json(out / shards.PLAN, wanted))
        elif plan != wanted:
            raise DataError(f"{out}: {_difference(plan, wanted)}; choose another OUT or remove this one")
        yield


def _difference(plan: dict[str, Any], wanted: dict[str, Any]) -> str:
    if (plan.get("format"), plan.get("version")) != (wanted["format"], wanted["version"]):
        return f"made in format {plan.get('format')} {plan.get('version')}, not {shards.FORMAT} {shards.VERSION}"
    before, now = plan["options"], wanted["options"]
    for key in {**now, **before}:
        if before.get(key) != now.get(key):
            return f"begun with {key}={before.get(key)!r}, now {key}={now.get(key)!r}"
    return "begun with other annotations: the source has changed"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        lock = open(out / _LOCK, "w")  # noqa: SIM115  # by the next `with`
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(out)) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: another process is preparing here") from None
        except OSError:  # a file system without locks
            pass
        yield


def writing(out: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(out)) from None
