"""Several finished runs on one page: `debiaskd report`.

Runs that differ in nothing but their seed are one entry, mean ± sample standard deviation. Runs that were measured on
other images stand in a section of their own: their figures do not compare.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from debiaskd.reports.curves import losses, pareto, validation
from debiaskd.reports.measured import Measured, measure
from debiaskd.reports.page import render
from debiaskd.reports.sections import Section, sectioned
from debiaskd.training.run import STAGE, RunError, finished, open_run
from debiaskd.utils import files
from debiaskd.version import __version__

#: (what is being done, share of it that is over, "").
ProgressCallback = Callable[[str, float, str], None]


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    split: str | None = None,
    data: str | None = None,
    progress: ProgressCallback | None = None,
    notes: Sequence[str] = (),
) -> list[str]:
    """Measures the runs where that was not done yet, and writes the page.

    Args:
        runs: folders.
        out: the page; whole, or as it was before.
        split: that they are measured on; None: the test of each recipe.
        data: where the prepared data of all of them lies; None: as each recipe says.
        progress: called with (task, share done, news).
        notes: paragraphs at the top of the page.

    Returns:
        What each section is of, in words.

    Raises:
        RunError, RecipeError, DataError, NetworkError: a run is none, is not finished, or is given twice; by name.
        OSError: `out` cannot be written; before anything is measured.
    """
    folders = [Path(run) for run in runs]
    _check(folders)
    files.probe(out)
    measured = []
    for i, (folder, name) in enumerate(zip(folders, names(folders))):
        if progress is not None:
            progress(f"measuring {name}", i / len(folders), "")
        measured.append(measure(folder, name, split, data))
    _check_twins(measured)
    sections = sectioned(measured)
    files.write_text(out, page(sections, notes))
    return [f"{len(section.runs)} run{'s'[: len(section.runs) > 1]} on {section.title}" for section in sections]


def page(sections: Sequence[Section], notes: Sequence[str] = ()) -> str:
    """The HTML of `write_report`."""
    count = sum(len(section.runs) for section in sections)
    headline = sections[0].headline if len(sections) == 1 else f"{count} runs on {len(sections)} sets of images"
    charts = [(pareto(section), losses(section), validation(section)) for section in sections]
    return render(
        "comparison.html.j2",
        sections=list(zip(sections, charts)),
        headline=headline,
        notes=list(notes),
        version=__version__,
    )


def _check(folders: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for folder in folders:
        same = seen.setdefault(folder.resolve(), folder)
        if same is not folder:
            raise RunError(f"{folder}: is given twice" + ("" if str(same) == str(folder) else f", also as {same}"))
    for folder in folders:
        open_run(folder)
    unfinished = [str(folder) for folder in folders if not (folder / "student" / STAGE).is_file()]
    if len(unfinished) > 1:
        raise RunError(f"{', '.join(unfinished)}: are not finished")
    for folder in folders:
        finished(folder, "student")


def _check_twins(measured: Sequence[Measured]) -> None:
    """The same outcome twice would pass for two, and make the spread smaller."""
    seen: dict[str, Measured] = {}
    for run in measured:
        same = seen.setdefault(run.fingerprint, run)
        if same is not run:
            raise RunError(f"{run.name}: is the same run as {same.name}")


def names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the folders' paths, as many as it takes to tell them apart.

    Example:
        >>> from pathlib import Path
        >>> from debiaskd.reports.comparison import names
        >>> names([Path("runs/a/0"), Path("runs/b/0")])
        ['a/0', 'b/0']
    """
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        found = ["/".join(part[-count:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    return [str(folder) for folder in folders]
