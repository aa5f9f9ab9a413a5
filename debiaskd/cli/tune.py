"""`debiaskd tune`: its options, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from debiaskd.cli.arguments import positive


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
    from debiaskd.recipe import read
    from debiaskd.recipe.sweep import parse_over
    from debiaskd.reports.sweeps import sweep

    over, base = parse_over(options.over), read(options.recipe, overrides)
    out = options.out or Path("runs") / f"tune-{options.recipe.stem}"
    found = sweep(str(options.recipe), base, over, out, draw=options.random, seeds=options.seeds, progress=progress)
    return list(found.lines), not found.lines or found.best is not None
