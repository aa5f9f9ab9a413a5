"""The model card of a run's student: README.md in the layout of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from debiaskd.evaluation.evaluate import LoadedStage
from debiaskd.evaluation.pretrained import CARD, CONFIG, WEIGHTS, config, is_pretrained, is_timms, write_weights
from debiaskd.evaluation.trust import read_judged
from debiaskd.metrics import worst_group_interval
from debiaskd.models.heads import count_parameters
from debiaskd.recipe import Recipe, to_dict
from debiaskd.reports.sections import DETAILS
from debiaskd.training.run import RunError
from debiaskd.training.validation import HEADINGS
from debiaskd.utils import files
from debiaskd.version import __version__


def save_pretrained(run: Path, folder: Path, *, student: str = "student") -> Path:
    """Write a run's student in the layout of the Hugging Face hub; see `debiaskd.evaluation.pretrained`.

    Args:
        run: folder of the run.
        folder: is made; an earlier one of these is replaced.
        student: the stage whose model it is.

    Returns:
        `folder`.

    Raises:
        RunError: the run is not finished, or `folder` holds something else.
        NetworkError: the network cannot be rebuilt.
        OSError: it cannot be written.
    """
    if folder.exists() and any(folder.iterdir()) and not is_pretrained(folder):
        raise RunError(f"{folder}: is not empty and was not written by save_pretrained; choose another folder")
    loaded = LoadedStage(run, student)
    evaluations = _evaluations(loaded)
    metrics = {split: document["figures"] for split, document in evaluations.items()}
    metrics = {f"{loaded.recipe.data.validation} (validation)": loaded.stage.facts.get("figures", {}), **metrics}
    known = {split: {k: v for k, v in found.items() if v is not None} for split, found in metrics.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # without it the folder is none
    write_weights(loaded, folder / WEIGHTS)
    files.write_text(folder / CARD, card(loaded, known, evaluations))
    files.write_json(folder / CONFIG, config(loaded, known, files.sha256(folder / WEIGHTS)))
    return folder


def _evaluations(loaded: LoadedStage) -> dict[str, dict[str, Any]]:
    """What `debiaskd evaluate` wrote of this model, by split; of other data than the run's with the data's name."""
    found = {}
    weights = loaded.stage.outputs.get(loaded.stage.model.name)
    for path in sorted(loaded.folder.glob("evaluation-*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("stage") == loaded.name and weights is not None:
            data, name = document["data"]["path"], document["split"]
            same = Path(data).resolve() == Path(loaded.recipe.data.path).resolve()
            found[name if same else f"{name} of {Path(data).name}"] = {**document, "file": path}
    return found


def card(
    loaded: LoadedStage, metrics: Mapping[str, Mapping[str, float]], evaluations: Mapping[str, Mapping[str, Any]]
) -> str:
    """The text of README.md.

    Args:
        loaded: the student.
        metrics: by split, as fractions.
        evaluations: the documents that `debiaskd evaluate` wrote, by split.
    """
    recipe, facts = loaded.recipe, loaded.stage.facts
    library = "timm" if is_timms(loaded.design) else "debiaskd"
    front = ["---", f"library_name: {library}", "pipeline_tag: image-classification", "tags:"]
    front += [f"- {tag}" for tag in ("image-classification", *(["timm"] if library == "timm" else []), "debiaskd")]
    front += ["# license: choose one", "---", ""]
    name = loaded.design.described()
    kept = ""
    if "epoch" in facts:
        kept = f"Epoch {facts['epoch'] + 1} of {facts['epochs']} was kept, by {facts['selection']}."
    lines = [
        f"# {name}, {len(loaded.classes)} classes",
        "",
        f"An image classifier of {count_parameters(loaded.model):,} parameters, trained with debiaskd {__version__}.",
        "",
        "## Data",
        "",
        *_data(loaded),
        "",
        "## Training",
        "",
        f"- teacher: {_teacher(recipe)}",
        f"- loss: {_terms(recipe)}",
        f"- sample weights: {_options(recipe.weights) if recipe.weights else 'none'}",
        f"- schedule: {_options(recipe.schedule)}",
        f"- seed: {recipe.seed}",
        "",
        *([kept, ""] if kept else []),
        "## Input",
        "",
        f"RGB images of {loaded.size[0]} × {loaded.size[1]} pixels ({loaded.contract}).",
        "",
        f"Labels: {', '.join(loaded.classes)}.",
        "",
        "## Metrics",
        "",
        *_metrics(metrics),
    ]
    for split, document in evaluations.items():
        lines += _groups(split, document)
    lines += ["", "## Use", "", *_use(library, loaded), "", "## License", "", "Not chosen yet.", ""]
    return "\n".join([*front, *lines])


def _data(loaded: LoadedStage) -> list[str]:
    recipe, facts = loaded.recipe, loaded.stage.facts
    counts: Mapping[str, int] = facts.get("training_groups") or {}
    data = recipe.data
    lines = [f"Trained on `{data.train}` of `{Path(data.path).name}`, the epoch chosen on `{data.validation}`."]
    if counts:
        lines += ["", "| group | training images |", "| --- | ---: |"]
        lines += [f"| {name} | {count:,} |" for name, count in counts.items()]
    return lines


def _teacher(recipe: Recipe) -> str:
    teacher = recipe.teacher
    if teacher is None:
        return "none"
    how = "given by its weights" if not teacher.is_trained else f"trained by method {teacher.method}"
    if teacher.head == "probe":
        how = "given, its last layer refitted"
    head = "; the student has its last layer" if recipe.transplant is not None else ""
    return f"{teacher.name}, {how}{head}"


def _terms(recipe: Recipe) -> str:
    found = to_dict(recipe)["terms"]
    parts = []
    for name in recipe.terms.given():
        options = {key: value for key, value in found[name].items() if value is not None}
        parts.append(f"`{name}` ({', '.join(f'{key} {value}' for key, value in options.items())})")
    return ", ".join(parts)


def _options(options: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in vars(options).items() if value is not None)


def _metrics(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A table of what is measured, in percent, by split."""
    rows = [(key, heading) for key, heading in HEADINGS if key not in DETAILS]
    rows = [(key, heading) for key, heading in rows if any(key in found for found in metrics.values())]
    lines = [f"| % | {' | '.join(metrics)} |", f"| --- |{' ---: |' * len(metrics)}"]
    for key, heading in rows:
        cells = (f"{100 * found[key]:.1f}" if key in found else "–" for found in metrics.values())
        lines.append(f"| {heading} | {' | '.join(cells)} |")
    return lines


def _groups(split: str, document: Mapping[str, Any]) -> list[str]:
    """Accuracy by group on a split, with 95 % intervals; nothing where images have no groups."""
    judged = None
    if document.get("images"):
        judged = read_judged(Path(document["file"]).with_name(document["images"]))
    if judged is None or judged.groups is None:
        return []
    found = worst_group_interval(judged.correct, judged.groups)
    lines = ["", f"Accuracy by group on {split}, with 95 % bootstrap intervals over its images:", ""]
    lines += ["| group | images | accuracy % | interval |", "| --- | ---: | ---: | ---: |"]
    for group, name in enumerate(document["groups"]):
        own = judged.correct[judged.groups == group]
        if len(own):
            one = worst_group_interval(own, torch.zeros(len(own), dtype=torch.int64))
            lines.append(f"| {name} | {len(own):,} | {100 * one.value:.1f} | {_percent(one.low, one.high)} |")
    lines.append(f"| worst group | | {100 * found.value:.1f} | {_percent(found.low, found.high)} |")
    lines += ["", "The intervals hold the trained model fixed: another seed may differ by more."]
    return lines


def _percent(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _use(library: str, loaded: LoadedStage) -> list[str]:
    lines = ["```python", "import debiaskd as dk", "from debiaskd.models.input import Preprocess", ""]
    lines += ['model = dk.load("FOLDER")', "preprocess = Preprocess(model.contract)"]
    lines += ["logits = model.student(preprocess(images))  # images: uint8 [N,3,H,W], or floats in 0..1", "```"]
    if library == "timm":
        lines += ["", "Or with timm alone:", "", "```python", "import timm", ""]
        lines += ['model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()', "```"]
    return lines
