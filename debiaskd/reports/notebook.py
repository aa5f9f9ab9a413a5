"""What runs and explanations look like in a notebook: HTML that stands alone."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from debiaskd.data import DataError
from debiaskd.evaluation.evaluate import LoadedStage, evaluation_split
from debiaskd.recipe import RecipeError
from debiaskd.reports.measured import Example, Look, choose, looks
from debiaskd.reports.page import render
from debiaskd.training.run import finished, open_run
from debiaskd.training.validation import HEADINGS, attribution_options

#: Images that are shown.
SHOWN = 4


def run_html(folder: Path) -> str:
    """The metrics of a finished run, of validation and of whatever it was evaluated on, and where its student looks.

    Raises:
        RunError, NetworkError: the run cannot be loaded. Data that is not there any more only costs the images.
    """
    stage, recipe = finished(folder, "student"), open_run(folder)
    columns: dict[str, dict[str, Any]] = {f"{recipe.data.validation} (validation)": stage.facts["figures"]}
    for path in sorted(folder.glob("evaluation-*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("stage") == "student":
            columns[document["split"]] = document["figures"]
    known = {key for figures in columns.values() for key, value in figures.items() if value is not None}
    rows = [
        (heading, [None if figures.get(key) is None else 100 * figures[key] for figures in columns.values()])
        for key, heading in HEADINGS
        if key in known
    ]
    return render(
        "run.html.j2",
        folder=str(folder),
        student=recipe.student.name,
        epoch=stage.facts["epoch"] + 1,
        epochs=stage.facts["epochs"],
        columns=list(columns),
        rows=rows,
        seen=_seen(folder),
    )


def _seen(folder: Path) -> list[tuple[Example, Look]]:
    with suppress(DataError, RecipeError):
        loaded = LoadedStage(folder)
        split = evaluation_split(loaded, loaded.recipe.data.validation)
        examples = choose(split, SHOWN)
        return list(zip(examples, looks(loaded, split, attribution_options(loaded.recipe, "student"), examples)))
    return []


def images_html(paths: Sequence[Path]) -> str:
    """PNG files, one below the other, with their names."""
    images = [(path.name, base64.b64encode(path.read_bytes()).decode()) for path in paths]
    return render("images.html.j2", images=images)
