"""The command line. Only this module prints.

Exit codes: 0 done; 2 bad usage or input, with one line on stderr; 130 stopped by Ctrl-C; 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from debiaskd.cli import discover as cli_discover
from debiaskd.cli import distill as cli_distill
from debiaskd.cli import export as cli_export
from debiaskd.cli import prepare as cli_prepare
from debiaskd.cli import train as cli_train
from debiaskd.cli import tune as cli_tune
from debiaskd.cli.arguments import Parser, UsageError, parse, positive
from debiaskd.utils.progress import shown as _progress
from debiaskd.version import __version__

if TYPE_CHECKING:
    from debiaskd.reports.summary import Summary

USAGE_ERROR, INTERRUPTED = 2, 130
#: Extras of the package that a missing module is in; any other one is in `train`.
_EXTRAS = {"torchdata": "data", "litdata": "data", "transformers": "hf"}


class Failure(Exception):  # noqa: N818
    """Something went wrong that is no mistake of usage: printed as one line, exit code 1."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The `debiaskd` command; returns its exit code."""
    try:
        options = parse(_parser(), sys.argv[1:] if arguments is None else arguments)
        _check_environment()
        with _warnings_in_one_line():
            code = _COMMANDS[options.command](options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Failure as error:
        _fail(_describe(error))
        return 1
    except (UsageError, OSError) as error:
        return _fail(_describe(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "debiaskd":
            raise
        extra = _EXTRAS.get((error.name or "").partition(".")[0], "train")
        return _fail(f"this command needs {error.name}, which is not installed: pip install 'debiaskd[{extra}]'")
    except KeyboardInterrupt:
        _fail("stopped")
        return INTERRUPTED
    return code or 0


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Ours; those of libraries stay as these have them."""
    formatted = warnings.formatwarning

    def shown(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
        if category.__module__.partition(".")[0] != "debiaskd":
            return formatted(message, category, *where, **line)
        return f"debiaskd: warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = formatted


def _fail(message: str) -> int:
    fabric = sys.modules.get("debiaskd.training.fabric")
    rank = None if fabric is None else fabric.rank()
    print(f"debiaskd: {'' if rank is None else f'rank {rank}: '}{message}", file=sys.stderr)
    return USAGE_ERROR


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def _parser() -> Parser:
    parser = Parser(prog="debiaskd", description="Compress vision models without inheriting their shortcuts.")
    parser.add_argument("--version", action="version", version=f"debiaskd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    quickstart = commands.add_parser(
        "quickstart",
        help="train a biased and a debiased student on real images and report",
        description="Trains a debiased teacher and students by several methods on images with a known shortcut, then "
        "writes OUT/results.json and OUT/report.html. Downloads nothing; minutes on two CPU cores.",
    )
    quickstart.add_argument(
        "--out", type=Path, default=Path("quickstart-out"), metavar="DIR", help="default: %(default)s"
    )
    quickstart.add_argument("--seeds", type=positive, default=3, metavar="N", help="seeds 0..N-1; default: %(default)s")
    quickstart.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="processes that train, one thread each; default: one for each core",
    )

    cli_distill.add(commands)
    cli_train.add(commands)
    cli_tune.add(commands)
    cli_export.add(commands)
    cli_discover.add(commands)
    cli_prepare.add(commands)

    commands.add_parser("doctor", help="which backend runs each op here, and why not the others")

    bench = commands.add_parser("bench", help="time the ops on every backend that runs here", add_help=False)
    bench.add_argument("rest", nargs=argparse.REMAINDER)
    return parser


def _check_environment() -> None:
    from debiaskd.ops import backend

    try:
        backend.requested()
    except ValueError as error:
        raise UsageError(error) from None


def _doctor(options: argparse.Namespace) -> None:
    from debiaskd.cli import doctor

    print("\n".join(doctor.report()))


def _bench(options: argparse.Namespace) -> int:
    code: int = import_module("debiaskd.bench.__main__").main(options.rest)
    return code


def _quickstart(options: argparse.Namespace) -> None:
    from rich.console import Console

    from debiaskd.cli import quickstart
    from debiaskd.reports import quickstart as report

    with _usage_errors(), _progress(Console(stderr=True)) as progress:
        results = quickstart.run(options.out, options.seeds, progress=progress, workers=options.workers)
    summaries = report.summarize(results.rows)
    _print_table(summaries)
    print(report.headline(summaries))
    for finding in report.findings(summaries):
        print(f"  {'ok' if finding.held else 'NOT AS EXPECTED'}: {finding.text}")
    print(f"{options.out / 'report.html'}\n{options.out / 'results.json'}")


def _prepare(options: argparse.Namespace) -> None:
    from rich.console import Console

    from debiaskd.data import DataError

    try:
        with _progress(Console(stderr=True)) as progress:
            lines = cli_prepare.run(options, progress)
    except DataError as error:
        raise UsageError(error) from None
    print("\n".join(lines))


def _train(options: argparse.Namespace) -> None:
    from rich.console import Console

    with _usage_errors():
        lines = cli_train.train(options, options.overrides, lambda: _progress(Console(stderr=True)))
    if lines:
        print("\n".join(lines))


def _distill(options: argparse.Namespace) -> None:
    from rich.console import Console

    with _usage_errors():
        for line in cli_distill.run(options, lambda: _progress(Console(stderr=True))):
            print(line, flush=True)


def _tune(options: argparse.Namespace) -> int:
    from rich.console import Console

    with _usage_errors():
        lines, chosen = cli_tune.run(options, options.overrides, lambda: _progress(Console(stderr=True)))
    if lines:
        print("\n".join(lines))
    return 0 if chosen else 1


def _lines_of(run: Callable[[argparse.Namespace], list[str]]) -> Callable[[argparse.Namespace], None]:
    """A command that prints what a function returns."""

    def command(options: argparse.Namespace) -> None:
        with _usage_errors():
            print("\n".join(run(options)))

    return command


def _discover(options: argparse.Namespace) -> None:
    from rich.console import Console

    with _usage_errors():
        lines = cli_discover.discover(options, options.overrides, lambda: _progress(Console(stderr=True)))
    print("\n".join(lines))


def _report(options: argparse.Namespace) -> None:
    from rich.console import Console

    with _usage_errors():
        print("\n".join(cli_train.report(options, lambda: _progress(Console(stderr=True)))))


@contextmanager
def _usage_errors() -> Iterator[None]:
    """What a recipe, a run, data or weights lack is for the user to put right."""
    from debiaskd.data import DataError
    from debiaskd.models.registry import NetworkError
    from debiaskd.recipe import RecipeError
    from debiaskd.training.checkpoint import CheckpointError
    from debiaskd.training.divergence import DivergedError
    from debiaskd.training.fabric import lost_another
    from debiaskd.training.run import RunError
    from debiaskd.utils.workers import WorkerError

    try:
        yield
    except (RecipeError, RunError, DataError, NetworkError, CheckpointError) as error:
        raise UsageError(error) from None
    except (DivergedError, WorkerError) as error:
        raise Failure(error) from None
    except (MemoryError, RuntimeError) as error:
        if lost_another(error):
            raise Failure(
                "another process has stopped, for a reason that it says; started again, train goes on"
            ) from None
        if not _out_of_memory(error):
            raise
        message = str(error).partition("\n")[0]
        raise Failure(f"out of memory; a smaller schedule.batch, or more schedule.accumulate ({message})") from None


def _out_of_memory(error: BaseException) -> bool:
    """On a GPU torch has an exception for it, on the CPU only words."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _print_table(summaries: Sequence[Summary]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from debiaskd.reports.quickstart import COLUMNS

    table = Table("method", box=box.SIMPLE)
    columns = [(key, heading, digits) for key, heading, digits in COLUMNS if all(key in s.figures for s in summaries)]
    for _, heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        table.add_row(summary.method, *(summary.figures[key].text(digits) for key, _, digits in columns))
    # A file has no width of its own; a table cut to a guessed one would lose numbers.
    (Console() if Console().is_terminal else Console(width=160)).print(table)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "quickstart": _quickstart,
    "distill": _distill,
    "train": _train,
    "tune": _tune,
    "evaluate": _lines_of(cli_train.evaluate),
    "discover": _discover,
    "explain": _lines_of(cli_train.explain),
    "report": _report,
    "export": _lines_of(cli_export.run),
    "prepare": _prepare,
    "doctor": _doctor,
    "bench": _bench,
}
