"""`debiaskd train`, `evaluate`, `explain` and `report`: their options, and what they say."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Progress = Callable[[str, float, str], None]


def add(commands: Any) -> None:
    """Adds the four commands to argparse's subparsers."""
    train = commands.add_parser(
        "train",
        help="train the student that a recipe describes",
        usage="%(prog)s [-h] [--out RUN] [--only teacher] [--print]\n                      RECIPE [--KEY VALUE ...]",
        description="Trains what RECIPE describes, with all that it needs before: teacher, weights, pretraining. "
        "An interrupted run resumes when it is started again; finished stages are reused. Any key "
        "can be overridden on the command line: --schedule.epochs 5 --terms.guide.loss l1.",
    )
    train.takes_keys, train.more = True, _keys
    train.add_argument(
        "recipe",
        type=Path,
        metavar="RECIPE",
        help="a YAML file, or the name of one that comes with debiaskd: waterbirds_dett, ...; another word lists them",
    )
    train.add_argument("--out", type=Path, metavar="RUN", help="folder of the run; default: runs/RECIPE")
    train.add_argument(
        "--only",
        choices=("teacher",),
        metavar="STAGE",
        help="teacher: train the recipe's teacher and nothing after it; without --only, train continues from there",
    )
    train.add_argument("--print", action="store_true", help="only print the whole recipe, with every default")
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a run's student on a split",
        description="Measures the student that RUN kept on a split of its data, by default the one that the recipe "
        "calls test, prints the figures and writes RUN/evaluation-SPLIT.json (of other data than the run's own: "
        "evaluation-SPLIT-NAME-FINGERPRINT.json). The threshold of the IoU is the one that was best on validation.",
    )
    evaluate.add_argument("run", type=Path, metavar="RUN")
    evaluate.add_argument(
        "--split", metavar="NAME", help='such as "val" or "train[:10%%]"; default: the recipe\'s test'
    )
    evaluate.add_argument(
        "--stage", default="student", metavar="NAME", help="another of the run's models; default: %(default)s"
    )
    evaluate.add_argument(
        "--data", metavar="DIR", help="other prepared images of the same classes, or where the run's own lie now"
    )
    evaluate.add_argument(
        "--faithfulness",
        type=int,
        metavar="IMAGES",
        help="also measure on so many images whether maps name the pixels that the class's probability depends on",
    )
    evaluate.add_argument(
        "--probe",
        metavar="DATA",
        help="instead: fit a linear classifier for these prepared images on the frozen features",
    )
    evaluate.add_argument(
        "--probe-splits",
        nargs=2,
        default=("train", "test"),
        metavar=("FIT", "MEASURE"),
        help="splits of DATA to fit on and to measure on; default: train test",
    )
    explain = commands.add_parser(
        "explain",
        help="show where a run's student looks",
        description="Writes images with the evidence for a class drawn over them, and their boxes where these are "
        "known: before guidance (the run's pretraining, or --before) and after it.",
    )
    explain.add_argument("run", type=Path, metavar="RUN")
    explain.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, or images of the run's data such as val:12"
    )
    explain.add_argument("--target", metavar="CLASS", help="name or number; default: the label, or what is predicted")
    explain.add_argument("--before", type=Path, metavar="RUN", help="another run to compare with")
    explain.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/explanations")
    explain.add_argument("--data", metavar="DIR", help="where the prepared data lies now, if it was moved")
    report = commands.add_parser(
        "report",
        help="compare finished runs on one page",
        description="Writes one HTML file that loads nothing from elsewhere: figures of each run's student, runs that "
        "differ in the seed alone as mean and standard deviation; accuracy by group; what was kept on validation; "
        "where each looks; losses. Runs that were not evaluated yet are.",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE.html", help="default: %(default)s"
    )
    report.add_argument("--split", metavar="NAME", help="of all runs' data; default: the test of each recipe")
    report.add_argument("--data", metavar="DIR", help="measure all runs on these prepared images; default: their own")


def _keys(width: int) -> str:
    from debiaskd.recipe.reference import as_text

    return as_text(width)


def train(options: argparse.Namespace, overrides: Sequence[str], progress: Callable[[], Any]) -> list[str]:
    """Does it; returns what is to be printed, nothing on ranks other than the first.

    Raises:
        RecipeError, RunError, DataError, NetworkError, CheckpointError, DivergedError, OSError: in one line each.
    """
    from debiaskd.recipe import read

    recipe = read(options.recipe, overrides)
    if options.print:
        from debiaskd.training.run import as_yaml

        return as_yaml(recipe).rstrip().split("\n")
    from debiaskd.pipeline.stages import Pipeline
    from debiaskd.pipeline.teachers import trained_options
    from debiaskd.training.fabric import launch

    if options.only is not None:
        trained_options(recipe)
    folder = options.out or Path("runs") / options.recipe.stem
    fabric = launch(recipe.compute)
    with progress() if fabric.is_global_zero else _silence() as say:
        pipeline = Pipeline(recipe, folder, fabric, say)
        stage = pipeline.student() if options.only is None else pipeline.teacher_alone()
    return _trained(stage.facts, stage.model) if fabric.is_global_zero else []


def _trained(facts: Mapping[str, Any], model: Path) -> list[str]:
    """The lines about a finished stage; one that only fits a last layer has no metrics of epochs."""
    if "figures" not in facts:
        return [*(f"{name}: {value}" for name, value in facts.items()), str(model)]
    names = {f"group_{g}_accuracy": f"accuracy of {name}" for g, name in enumerate(facts["training_groups"] or {})}
    lines = [f"{names.get(key, key)}: {_number(value)}" for key, value in facts["figures"].items() if value is not None]
    kept = f"epoch {facts['epoch'] + 1} of {facts['epochs']}, by {facts['selection']}"
    if facts.get("stopped"):
        stopped = facts["stopped"]
        kept += f"; stopped after epoch {stopped['epochs']}: {stopped['why']}"
    return [f"validation figures of {kept}", *lines, str(model)]


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"


@contextmanager
def _silence() -> Iterator[Progress]:
    yield lambda task, done, news: None


def evaluate(options: argparse.Namespace) -> list[str]:
    """Does it; returns what is to be printed.

    Raises:
        as `train`.
    """
    from debiaskd.evaluation.evaluate import evaluate_run
    from debiaskd.recipe import RecipeError
    from debiaskd.training.validation import COUNTS, HEADINGS

    if options.probe is not None:
        return _probe(options)
    if options.faithfulness is not None and options.faithfulness < 1:
        raise RecipeError(f"--faithfulness: must be a number of images >= 1, got {options.faithfulness}")
    document, path = evaluate_run(
        options.run, options.stage, options.split, options.data, faithful=options.faithfulness
    )
    figures, headings = document["figures"], dict([*HEADINGS, *COUNTS])
    headings |= {f"group_{g}_accuracy": name for g, name in enumerate(document["groups"])}
    headings |= {f"environment_{g}_accuracy": name for g, name in enumerate(document["groups"])}
    headings |= {f"group_{g}_ece": f"ECE, {name}" for g, name in enumerate(document["groups"])}
    epoch = "" if document["epoch"] is None else f", epoch {document['epoch'] + 1}"
    where = document["split"] + ("" if options.data is None else f" of {options.data}")
    lines = [f"{options.stage} of {options.run}{epoch}, on {where} ({document['pictures']} images)"]
    for name, value in figures.items():
        if value is not None:
            lines.append(f"{headings.get(name, name):>24} {_number(value)}")
    return [*lines, str(path)]


def _probe(options: argparse.Namespace) -> list[str]:
    from debiaskd.evaluation.probe import probe_run
    from debiaskd.recipe import RecipeError

    for name in ("split", "data"):
        if getattr(options, name) is not None:
            raise RecipeError(f"--{name}: is not for --probe, which has --probe-splits")
    document, path = probe_run(options.run, options.stage, options.probe, tuple(options.probe_splits))
    fitted, measured = document["pictures"]
    lines = [
        f"linear probe on {document['features']} frozen features of {options.run}: fitted on {fitted}, measured on "
        f"{measured} images of {options.probe}"
    ]
    found = {name: value for name, value in document["figures"].items() if value is not None}
    lines += [f"{name:>24} {_number(value)}" for name, value in found.items()]
    return [*lines, str(path)]


def explain(options: argparse.Namespace) -> list[str]:
    """Does it; returns the names of the images that were written."""
    from debiaskd.evaluation.explain import explain_run

    written = explain_run(
        options.run,
        options.images,
        target=options.target,
        before=options.before,
        out=options.out,
        data=options.data,
    )
    return [str(path) for path in written]


def report(options: argparse.Namespace, progress: Callable[[], Any]) -> list[str]:
    """Does it; returns what is to be printed.

    Raises:
        as `train`.
    """
    from debiaskd.reports.comparison import write_report

    with progress() as say:
        sections = write_report(options.runs, options.out, split=options.split, data=options.data, progress=say)
    return [*sections, str(options.out)]
