"""`debiaskd distill`: from a folder of images and a teacher's name to a debiased student and a page that shows it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from debiaskd.cli.arguments import UsageError, natural, positive

if TYPE_CHECKING:
    from debiaskd.pipeline.distillation import Asked, Findings, Plan

STATE, RECIPE, PAGE = "distill.json", "recipe.yaml", "report.html"
#: Metrics that are printed, with their headings.
SHOWN = {
    "accuracy": "accuracy",
    "worst_group_accuracy": "worst group",
    "f1": "F1",
    "map": "mAP",
    "epg": "energy in box",
}


def add(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    distill = commands.add_parser(
        "distill",
        help="from images and a teacher to a debiased student and a page that shows it",
        description="Prepares PICTURES once, says what is annotated there, trains the teacher or takes it from "
        "--weights, measures how biased it is, chooses a method by what is annotated, distils, and measures teacher, "
        "plain student and debiased student on the test images. Interrupted and started again it continues.",
    )
    distill.add_argument(
        "pictures", type=Path, metavar="PICTURES", help="as for `prepare folder`, or a folder that was prepared"
    )
    distill.add_argument("--teacher", required=True, metavar="T", help="network, as in recipes: resnet50, my_nets:Net")
    distill.add_argument("--student", required=True, metavar="S", help="network")
    distill.add_argument("--bias", type=Path, metavar="CSV", help="path,bias; default: PICTURES/bias.csv")
    distill.add_argument("--boxes", type=Path, metavar="CSV", help="default: PICTURES/boxes.csv")
    distill.add_argument("--weights", metavar="FILE", help="of the teacher, which is then not trained")
    distill.add_argument(
        "--pretrained",
        action="store_true",
        help="begin from published weights, which are downloaded",
    )
    distill.add_argument("--minutes", type=_minutes, metavar="N", help="budget: fewer epochs than 30, if need be")
    distill.add_argument("--size", type=positive, metavar="N", help="side in pixels; default: theirs, at most 224")
    distill.add_argument("--seed", type=natural, default=0, metavar="N", help="default: %(default)s")
    distill.add_argument("--out", type=Path, metavar="DIR", help="default: runs/distill-PICTURES")


def run(options: argparse.Namespace, progress: Callable[[], Any]) -> Iterator[str]:
    """Do it, and yield lines to be printed as soon as they are known.

    Raises:
        RecipeError, RunError, DataError, NetworkError, CheckpointError, DivergedError, OSError: in one line each.
    """
    from debiaskd.pipeline import distillation
    from debiaskd.reports.comparison import write_report

    out = options.out or Path("runs") / f"distill-{options.pictures.resolve().name}"
    _check_state(options, out)
    data = _prepared(options, out, progress)
    found = distillation.find(data)
    notes = found.lines()
    yield from notes
    asked = distillation.Asked(options.teacher, options.student, _weights(options), options.pretrained, options.seed)
    head = None if asked.weights is None else distillation.given_head(asked, found)
    epochs, said = _epochs(options, out, found, asked)
    notes.append(said)
    yield said
    plan, teacher = distillation.plan(found, asked, out, epochs, head=head), None
    if asked.weights is not None and head is None:
        teacher, line = _measured(plan, found, found.splits["validation"])
        notes.append(f"the given teacher, on validation: {line}")
        yield notes[-1]
        if found.groups and _gap(teacher) > distillation.GAP:
            plan = distillation.plan(found, asked, out, epochs, head="probe")
            plan.why.insert(0, "the given teacher is biased: its last layer is refitted, every group counting alike")
    recipe = _write(out, plan)
    lines = [*plan.why, f"method: {plan.method}"]
    notes += lines
    yield from lines
    yield from recipe.read_text(encoding="utf-8").rstrip().splitlines()
    table: dict[str, Mapping[str, float | None]] = {}
    if asked.weights is None:
        table["teacher"] = _trained(plan, "teacher", out, progress)
        notes.append(f"the teacher, on test: {distillation.bias_in_words(table['teacher'], found.groups)}")
        yield notes[-1]
    table["plain student"] = _trained(plan, "plain", out, progress)
    yield f"the plain student, on test: {distillation.bias_in_words(table['plain student'], found.groups)}"
    table["debiased student"] = _trained(plan, "debiased", out, progress)
    if asked.weights is not None:
        table = {"teacher": _given_teacher(plan, out, found), **table}
        notes.append(f"the teacher, on test: {distillation.bias_in_words(table['teacher'], found.groups)}")
        yield notes[-1]
    yield f"the debiased student, on test: {distillation.bias_in_words(table['debiased student'], found.groups)}"
    yield from _table(table)
    if (warning := distillation.no_gain(table["plain student"], table["debiased student"])) is not None:
        notes.append(warning)
        yield warning
    runs = [out / name for name, document in plan.recipes.items() if document is not None]
    order = [out / name for name in ("teacher", "plain", "debiased") if out / name in runs]
    with progress() as say:
        write_report(order, out / PAGE, notes=notes, progress=say)
    yield from (str(out / PAGE), str(recipe))


def _prepared(options: argparse.Namespace, out: Path, progress: Callable[[], Any]) -> Path:
    """The prepared folder: PICTURES itself, or made of it below `out`."""
    from debiaskd.data import prepare

    if (options.pictures / "manifest.json").is_file():
        given = [name for name in ("bias", "boxes", "size") if getattr(options, name) is not None]
        if given:
            raise UsageError(f"--{given[0]}: {options.pictures} is prepared already; prepare it again with it")
        return Path(options.pictures)
    with progress() as say:
        prepare(
            "folder",
            options.pictures,
            out / "data",
            size=options.size or _side(options.pictures),
            workers=None,
            bias=options.bias,
            boxes=options.boxes,
            progress=lambda split, done: say(f"preparing {split}", done, ""),
        )
    return out / "data"


def _side(folder: Path, looked: int = 64) -> int:
    """The middle one of the shorter sides of the first images, as a multiple of 8; between 32 and 224."""
    from PIL import Image

    from debiaskd.data.sources.names import EXTENSIONS

    sides: list[int] = []
    for place, below, names in os.walk(folder):
        below.sort()
        for name in sorted(names):
            if name.lower().endswith(EXTENSIONS) and len(sides) < looked:
                try:
                    with Image.open(Path(place, name)) as image:
                        sides.append(min(image.size))
                except (OSError, SyntaxError, ValueError):
                    continue
    middle = sorted(sides)[len(sides) // 2] if sides else 224
    return max(32, min(224, (middle + 4) // 8 * 8))


def _weights(options: argparse.Namespace) -> str | None:
    return None if options.weights is None else str(Path(options.weights).expanduser())


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """What decides about the recipes."""
    names = ("teacher", "student", "pretrained", "seed", "minutes")
    return {**{name: getattr(options, name) for name in names}, "weights": _weights(options)}


def _check_state(options: argparse.Namespace, out: Path) -> dict[str, Any] | None:
    """What was begun in a folder; None: nothing.

    Raises:
        UsageError: it was begun with other options.
    """
    from debiaskd.utils import files

    try:
        state: dict[str, Any] | None = files.read_json(out / STATE)
    except ValueError:
        raise UsageError(f"{out / STATE}: damaged; choose another --out") from None
    for name, value in _asked(options).items() if state is not None else ():
        before = None if state is None else state["options"].get(name)
        if before != value:
            raise UsageError(f"{out}: was begun with --{name} {before}, not {value}; choose another --out")
    return state


def _epochs(options: argparse.Namespace, out: Path, found: Findings, asked: Asked) -> tuple[int, str]:
    """(epochs, where the number comes from); those that the folder was begun with, if it was."""
    from debiaskd.pipeline.budget import affordable
    from debiaskd.pipeline.distillation import EPOCHS
    from debiaskd.utils import files

    state = _check_state(options, out)
    if state is not None:
        return int(state["epochs"]), str(state["said"])
    if options.minutes is None:
        epochs, said = EPOCHS, f"{EPOCHS} epochs of each training; --minutes sets a budget"
    else:
        epochs, said = affordable(found, asked, options.minutes)
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / STATE, {"options": _asked(options), "epochs": epochs, "said": said})
    return epochs, said


def _write(out: Path, plan: Plan) -> Path:
    """The recipe of the debiased student; `debiaskd train` takes it."""
    import yaml

    from debiaskd.utils import files

    head = f"# {plan.method}: debiaskd train {out / RECIPE}\n"
    files.write_text(out / RECIPE, head + yaml.safe_dump(plan.recipes["debiased"], sort_keys=False))
    return out / RECIPE


def _trained(plan: Plan, name: str, out: Path, progress: Callable[[], Any]) -> dict[str, float | None]:
    """Train one of the runs, and measure its student on the test images."""
    from debiaskd.evaluation.evaluate import evaluate_run
    from debiaskd.pipeline.stages import Pipeline
    from debiaskd.recipe import read
    from debiaskd.training.fabric import launch

    document = plan.recipes[name]
    assert document is not None
    recipe = read(document)
    fabric = launch(recipe.compute)
    with progress() as say:
        Pipeline(recipe, out / name, fabric, lambda task, *news: say(f"{name}: {task}", *news)).student()
    return dict(evaluate_run(out / name, "student", None, None)[0]["figures"])


def _measured(plan: Plan, found: Findings, split: str) -> tuple[dict[str, float | None], str]:
    from debiaskd.evaluation.given_teacher import measure_teacher
    from debiaskd.pipeline.distillation import bias_in_words
    from debiaskd.recipe import read

    document = plan.recipes["debiased"]
    assert document is not None
    figures = measure_teacher(read(document), split)
    return figures, bias_in_words(figures, found.groups)


def _given_teacher(plan: Plan, out: Path, found: Findings) -> dict[str, float | None]:
    """The metrics of the teacher that was distilled: with the last layer that was fitted, or as it was given."""
    from debiaskd.evaluation.evaluate import evaluate_run

    if (out / "debiased" / "teacher").is_dir():
        return dict(evaluate_run(out / "debiased", "teacher", None, None)[0]["figures"])
    return _measured(plan, found, found.splits["test"])[0]


def _gap(figures: Mapping[str, float | None]) -> float:
    average, worst = figures.get("accuracy"), figures.get("worst_group_accuracy")
    return 0.0 if average is None or worst is None else average - worst


def _table(rows: Mapping[str, Mapping[str, float | None]]) -> Sequence[str]:
    """Percentages on the test images, as lines."""
    columns = [key for key in SHOWN if any(row.get(key) is not None for row in rows.values())]
    lines = [f"{'test, %':>18}" + "".join(f"{SHOWN[key]:>15}" for key in columns)]
    for name, row in rows.items():
        values = ("–" if row.get(key) is None else f"{100 * (row[key] or 0.0):.1f}" for key in columns)
        lines.append(f"{name:>18}" + "".join(f"{value:>15}" for value in values))
    return lines


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value
