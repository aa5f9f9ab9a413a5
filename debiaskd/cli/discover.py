"""`debiaskd discover`: its options, and what it says."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    discover = commands.add_parser(
        "discover",
        help="find groups within each class, without annotation of the bias",
        usage="%(prog)s [-h] [--method NAME] [--out DIR] RUN|DATA [--KEY VALUE ...]",
        description="Finds groups within each class from a plainly trained model: that of RUN or, for prepared DATA, "
        "one that is trained for it, by the recipe `discover`, whose keys can be overridden: --student.name resnet50 "
        "--student.pretrained true --discovery.epochs 2. Writes DIR/bias.csv, which `data.groups` of recipes and "
        "`prepare folder` read; DIR/groups.json with sizes and accuracies; and DIR/groups.html, a page to look at.",
    )
    discover.takes_keys = True
    discover.add_argument("source", type=Path, metavar="RUN|DATA", help="a run's folder, or a prepared one")
    discover.add_argument(
        "--method",
        choices=("environments", "clusters"),
        default="environments",
        help="environments, two in each class, by the model's logits; or clusters of its features and early losses; "
        "default: %(default)s",
    )
    discover.add_argument(
        "--stage", metavar="NAME", help="of RUN, whose model; default: the briefest that was trained plainly"
    )
    discover.add_argument(
        "--data", metavar="DIR", help="of RUN: other prepared images of the same classes, or where its own lie now"
    )
    discover.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/found, or found/DATA")


def discover(options: argparse.Namespace, overrides: Sequence[str], progress: Callable[[], Any]) -> list[str]:
    """Do it; return what is to be printed.

    Raises:
        RecipeError, RunError, DataError, NetworkError, CheckpointError, DivergedError, OSError: in one line each.
    """
    from debiaskd.recipe import RecipeError
    from debiaskd.reports.found_groups import discover as found_in
    from debiaskd.reports.found_groups import joined
    from debiaskd.training.run import open_run
    from debiaskd.utils import files

    if (options.source / "recipe.yaml").is_file():
        if overrides:
            raise RecipeError(f"{overrides[0]}: only for DATA; {options.source} is a run that was trained already")
        folder, out = options.source, options.out or options.source / "found"
    else:
        for name in ("stage", "data"):
            if getattr(options, name) is not None:
                raise RecipeError(f"--{name}: only for a run, and {options.source} is none")
        out = options.out or Path("found") / options.source.resolve().name
        folder = _trained(options, overrides, out / "run", progress)
    data = open_run(folder).data
    path = options.data or data.path
    parts = {
        split: found_in(folder, path, split=split, method=options.method, stage=options.stage)
        for split in (data.train, data.validation)
    }
    first = next(iter(parts.values()))
    out.mkdir(parents=True, exist_ok=True)
    found, names = joined(list(parts.values()))
    found.to_csv(out / "bias.csv", names, first.classes)
    first.gallery(out / "groups.html")
    document, lines = {"method": options.method, "model": first.judge.name, "data": str(path), "splits": {}}, []
    for split, groups in parts.items():
        sizes, accuracy = groups.sizes(), groups.accuracy()
        facts: dict[str, Any] = {"sizes": sizes, "accuracy": accuracy, "against_known": _score(groups)}
        document["splits"][split] = facts
        lines.append(f"{split}: {len(groups)} images, groups found by {options.method} of {first.judge.name}")
        lines += [f"{name:>32} {sizes[name]:7d} images, {100 * accuracy[name]:5.1f} % right" for name in sizes]
        if facts["against_known"] is not None:
            lines += [f"{name:>32} {value:.4g}" for name, value in facts["against_known"].items()]
    files.write_json(out / "groups.json", document)
    return [*lines, *(str(out / name) for name in ("bias.csv", "groups.json", "groups.html"))]


def _trained(options: argparse.Namespace, overrides: Sequence[str], folder: Path, progress: Callable[[], Any]) -> Path:
    """The folder of a run whose stages of discovery are finished."""
    from debiaskd.pipeline.discovery import discovered
    from debiaskd.pipeline.stages import Pipeline
    from debiaskd.recipe import Discovery, check, read
    from debiaskd.training.fabric import launch

    recipe = read("discover", ["--data.path", str(options.source), *overrides])
    kept = recipe.discovery or Discovery()
    recipe = check(replace(recipe, discovery=replace(kept, method=options.method)))
    with progress() as say:
        chain = Pipeline(recipe, folder, launch(recipe.compute), say)
        try:
            discovered(chain)
        finally:
            chain.run.release()
    return folder


def _score(groups: Any) -> dict[str, float] | None:
    """Agreement with the groups that the data was prepared with, where it has any that can be told apart."""
    try:
        score: dict[str, float] = groups.score()
    except ValueError:
        return None
    return score
