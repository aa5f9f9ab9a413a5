"""Progress of long work, for terminals, notebooks and log files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def shown(console: Console) -> Iterator[Callable[..., None]]:
    """Show progress as a bar on a terminal or in a notebook; elsewhere, in a log file for example, as a line for each
    task that begins and for each news.

    Args:
        console: where it is shown.

    Yields:
        A function (task, share of it that is done, news or "").
    """
    if not (console.is_terminal or console.is_jupyter):
        begun: set[str] = set()

        def line(task: str, done: float, news: str = "") -> None:
            if task not in begun or news:
                begun.add(task)
                sys.stderr.write(f"{100 * done:3.0f} % {task}{news and f', {news}'}\n")
                sys.stderr.flush()

        yield line
        return

    from rich import progress

    columns = (progress.TextColumn("{task.description:24}"), *progress.Progress.get_default_columns()[1:])
    columns = (*columns, progress.TextColumn("{task.fields[news]}"))
    with progress.Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("data", total=1.0, news="")

        def show(task: str, done: float, news: str = "") -> None:
            if news.startswith(("epoch", "input", "weights", "stopped")):
                bars.console.print(f"{task}, {news}", highlight=False, soft_wrap=True)
            elif news:
                bars.update(bar, news=news)
            bars.update(bar, description=task, completed=done)

        yield show
