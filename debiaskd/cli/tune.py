"""`debiaskd tune`: its options, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from debiaskd.cli.arguments import positive

PAGE, RESULTS, BEST = "tune.html", "results.json", "best.yaml"


def add(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    tune = commands.add_parser(
        "tune",
        help="train a recipe with several values of its keys and choose on validation",
        usage="%(prog)s [-h] --over KEY=V1,V2,... [--over ...] [--random N] [--seeds N] [--out DIR] RECIPE "
        "[--KEY VALUE ...]",
        description="Trains RECIPE with every combination of the values, the stages before the student's once for all "
        "that share them, and chooses the combination with the highest mean of what selection.rule compares, on "
        "validation; test is not read. Writes DIR/tune.html, DIR/results.json and DIR/best.yaml, the chosen recipe. "
        "Started again it continues: finished trials are not repeated, and further values can be added.",
    )
    tune.takes_keys = True
    tune.add_argument("recipe", type=Path, metavar="RECIPE", help="as for `train`")
    tune.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="KEY=V1,V2,...",
        help="a key and its values, such as weights.up=1,5,20,50; several times for several keys",
    )
    tune.add_argument("--random", type=positive, metavar="N", help="only N of the combinations, drawn at random")
    tune.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="trainings of each combination; default: %(default)s"
    )
    tune.add_argument("--out", type=Path, metavar="DIR", help="default: runs/tune-RECIPE")


def run(options: argparse.Namespace, overrides: Sequence[str], progress: Callable[[], Any]) -> tuple[list[str], bool]:
    """Do it; return (what is to be printed, whether a combination could be chosen).

    Raises:
        RecipeError, RunError, DataError, NetworkError, CheckpointError, OSError: in one line each.
    """
    from debiaskd.pipeline import tuning
    from debiaskd.recipe import read
    from debiaskd.recipe.sweep import parse_over, settings
    from debiaskd.reports import tuning as report
    from debiaskd.training.fabric import launch
    from debiaskd.utils import files

    over = parse_over(options.over)
    asked = settings(over, draw=options.random)
    base = read(options.recipe, overrides)
    out = options.out or Path("runs") / f"tune-{options.recipe.stem}"
    found = tuning.trials(base, asked, options.seeds, out)
    fabric = launch(base.compute)
    first, outcomes = fabric.is_global_zero, []
    criterion = tuning.check(found, fabric)
    with _alone(out, write=first), progress() if first else _silence() as say:
        for number, trial in enumerate(found, 1):

            def tell(task: str, done: float, news: str = "", name: str = f"{number} of {len(found)}") -> None:
                say(f"trial {name}, {task}", done, news)

            tell(str(trial), 0.0)
            outcomes.append(tuning.run(trial, fabric, tell))
            if outcomes[-1].error is not None:
                tell("failed", 1.0, f"{trial}: {outcomes[-1].error}")
            if first:
                best = tuning.chosen(outcomes, criterion)
                files.write_json(out / RESULTS, report.document(str(options.recipe), over, outcomes, criterion, best))
    if not first:
        return [], True
    rows, best = report.rows(outcomes, criterion), tuning.chosen(outcomes, criterion)
    printed, yaml = report.lines(rows, criterion, best), ""
    if best is not None:
        score = next(row.score for row in rows if row.setting.slug == best.slug)
        assert score is not None
        about = f"{best}: {criterion} {score.text(1)} % on validation, the best of {len(rows)} combinations"
        tuning.write_best(out / BEST, base, best, about)
        yaml = (out / BEST).read_text(encoding="utf-8")
        printed.append(str(out / BEST))
    report.write_page(out / PAGE, str(options.recipe), over, rows, criterion, best, yaml)
    return [*printed, str(out / RESULTS), str(out / PAGE)], best is not None


@contextmanager
def _alone(folder: Path, *, write: bool) -> Iterator[None]:
    """Nobody else tunes in this folder meanwhile.

    Raises:
        RunError: somebody does.
    """
    from debiaskd.training.run import LOCK, RunError
    from debiaskd.utils import files

    lock = None
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = files.Lock(folder / LOCK)
        except BlockingIOError:
            raise RunError(f"{folder}: another process tunes here; wait for it, or choose another --out") from None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@contextmanager
def _silence() -> Iterator[Callable[..., None]]:
    yield lambda task, done, news="": None
