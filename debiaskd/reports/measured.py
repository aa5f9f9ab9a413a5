"""One finished run, as a comparison shows it: figures, logs, and where the student looks."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from debiaskd.attribution.heat_map import heat_map
from debiaskd.boxes import Boxes
from debiaskd.evaluation.evaluate import LoadedStage, StageEvaluation, evaluation_split
from debiaskd.evaluation.trust import read_judged
from debiaskd.metrics import energy_in_box
from debiaskd.models.heads import count_parameters
from debiaskd.ops.ignore import of_class
from debiaskd.recipe import to_dict
from debiaskd.reports.gallery import data_uri, glowing
from debiaskd.terms import GuideOptions, make_guide
from debiaskd.training.batches import InputTransform, Split
from debiaskd.training.logs import read_table
from debiaskd.training.run import RunError, data_fingerprint, decisive, digest, open_run
from debiaskd.training.validation import Judged

#: Images that are shown, and how wide they are at most.
SHOWN, SIDE = 8, 160


@dataclass(frozen=True)
class Example:
    """An image of a split, its number and its name there, and the class whose evidence is looked at; boxes in `size`
    pixels."""

    number: int
    name: str
    target: int
    title: str
    uri: str
    boxes: list[list[int]]
    size: tuple[int, int]


@dataclass(frozen=True)
class Look:
    """What a student makes of an example: its evidence laid over it, the share of it in the boxes (None without
    boxes), the class's probability, and, where an image shows one class, what it takes it for."""

    uri: str
    energy: float | None
    score: float
    predicted: str | None
    right: bool


@dataclass(frozen=True)
class Measured:
    """A finished run on a split.

    Attributes:
        name: for people.
        settings: the recipe as far as it decides the outcome, without its seed.
        fingerprint: of the stage, and the weights' checksum: of the run itself, wherever it lies.
        seed, facts: of the run; see `debiaskd.training.run.Stage`.
        data: (name of the data set, of the split, number of images).
        images: tells whether two runs were measured on the same images.
        validated: tells whether two runs were validated on the same images.
        groups: names.
        figures: as `debiaskd evaluate` writes them: fractions, None where there is nothing to be measured.
        parameters: of the model.
        looked_at: layer and attribution, in words.
        steps, epochs: rows of log.csv and of epochs.csv.
        judged: what the student makes of each image; None where that is not known.
        examples, looks: images, and what the student makes of each.
    """

    name: str
    settings: dict[str, Any]
    fingerprint: str
    seed: int
    facts: dict[str, Any]
    data: tuple[str, str, int]
    pictures: str
    validated: str
    groups: tuple[str, ...]
    figures: dict[str, float | None]
    parameters: int
    looked_at: str
    steps: list[dict[str, float | None]]
    epochs: list[dict[str, float | None]]
    examples: list[Example]
    looks: list[Look]
    judged: Judged | None = None

    @property
    def epoch(self) -> int:
        """That was kept, from 1, as people count."""
        return int(self.facts["epoch"]) + 1


def measure(
    folder: Path,
    name: str,
    split: str | None = None,
    data: str | None = None,
    *,
    stage: str = "student",
    threshold: float | None = None,
) -> Measured:
    """Measure a run's student, or another stage's model, as `debiaskd evaluate` does.

    What that wrote earlier of the same is used again, and what is measured now is written for later.

    Args:
        folder: of the run.
        name: for people.
        split: that it is measured on; None: the recipe's test.
        data: where the prepared data lies; None: as the recipe says.
        stage: "student", or another that has a model, such as "teacher".
        threshold: of the IoU; None: the one that is best on validation.

    Raises:
        RunError, RecipeError, DataError, NetworkError: as their names say.
    """
    loaded = LoadedStage(folder, stage, data)
    pictures = evaluation_split(loaded, split)
    evaluated = StageEvaluation(loaded, pictures, threshold)
    document = evaluated.found()
    judged = None if document is None else read_judged(evaluated.images)
    if document is None:
        document = evaluated.measure()
        judged = evaluated.judged
        with suppress(OSError):  # of a run that may only be read there can still be a report
            evaluated.write(document)
    recipe, inputs = open_run(folder), loaded.stage.inputs
    settings = decisive(to_dict(recipe))
    seed = settings.pop("seed")
    if stage != "student":  # told from the runs' students
        settings["stage"] = stage
    path = Path(loaded.recipe.data.path)
    try:
        steps, epochs = (read_table(loaded.stage.folder / f"{log}.csv") for log in ("log", "epochs"))
    except ValueError as error:
        raise RunError(str(error)) from None
    examples = choose(pictures)
    return Measured(
        name=name,
        settings=_with_checksums(settings, Path(recipe.data.path).name, inputs),
        fingerprint=f"{loaded.stage.fingerprint} {loaded.stage.outputs.get(loaded.stage.model.name)}",
        seed=seed,
        facts=loaded.stage.facts,
        data=(path.resolve().name, pictures.name, len(pictures)),
        pictures=digest([data_fingerprint(str(path)), pictures.whole.split, pictures.numbers.tolist()]),
        validated=digest([inputs.get("data"), recipe.data.validation, recipe.data.seed]),
        groups=tuple(pictures.whole.groups),
        figures=document["figures"],
        parameters=count_parameters(loaded.model),
        looked_at=_in_words(evaluated.guide),
        steps=steps,
        epochs=epochs,
        examples=examples,
        looks=looks(loaded, pictures, evaluated.guide, examples),
        judged=judged,
    )


def _with_checksums(settings: dict[str, Any], data: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Files are told apart by what they held: the same names may mean others."""
    found = {**settings, "data": {"path": f"{data} {str(inputs.get('data'))[:8]}", **settings["data"]}}
    for part in ("student", "teacher"):
        checksum = inputs.get(f"{part}.weights")
        if checksum is not None:
            found[part] = {**found[part], "weights": f"{found[part]['weights']} {checksum[:8]}"}
    return found


def _in_words(guide: GuideOptions) -> str:
    attribution = "input × gradient" if guide.attribution is None else guide.attribution.replace("_", " ")
    return f"{attribution} at {guide.layer}"


# -- images -----------------------------------------------------------------------------------------------------


def choose(split: Split, count: int = SHOWN) -> list[Example]:
    """The first images of each group, or where there are none of each class, in turns: nobody picks the ones that
    look best. Those with boxes of their class come before those without."""
    grouped = split.groups is not None and not split.whole.multi_label
    places = _by_group(split) if grouped else _by_class(split)
    chosen: list[tuple[int, int]] = []
    for _ in range(count):
        for key, members in places.items():
            free = next((place for place in members if place not in {used for _, used in chosen}), None)
            if free is not None and len(chosen) < count:
                chosen.append((key, free))
    return [_example(split, place, key, grouped) for key, place in sorted(chosen)]


def _by_group(split: Split) -> dict[int, list[int]]:
    assert split.groups is not None
    boxed = _boxed(split, split.target)
    return {int(k): _first(split.groups == k, boxed) for k in split.groups.unique()}


def _by_class(split: Split) -> dict[int, list[int]]:
    found = {}
    for k in range(split.num_classes):
        shows = split.target[:, k] > 0 if split.whole.multi_label else split.target == k
        found[k] = _first(shows, _boxed(split, torch.full((len(split),), k)))
    return found


def _first(shows: Tensor, boxed: Tensor) -> list[int]:
    """Places: an image of several classes may be taken already, so more than are shown."""
    with_boxes, without = (part.nonzero()[: 2 * SHOWN, 0].tolist() for part in (shows & boxed, shows & ~boxed))
    return [*with_boxes, *without]


def _boxed(split: Split, target: Tensor) -> Tensor:
    """bool [N]: whether an image has a box of its target, [N]."""
    boxes, image = split.boxes, split.boxes.image_ids()
    own = torch.ones_like(image, dtype=torch.bool) if boxes.labels is None else boxes.labels == target[image]
    return torch.zeros(len(split), dtype=torch.bool).index_fill_(0, image[own], True)


def _example(split: Split, place: int, key: int, grouped: bool) -> Example:
    number = int(split.numbers[place])
    batch = split.whole.__getitems__([number])
    target = int(batch.target[0]) if grouped else key
    boxes = of_class(batch.boxes, torch.tensor([target]))
    title = split.whole.groups[key] if grouped else split.whole.classes[target]
    image = batch.images[0]
    height, width = image.shape[1:]
    name = f"{split.whole.split}:{number}"
    return Example(number, name, target, title, data_uri(image, SIDE), boxes.coords.tolist(), (height, width))


def looks(loaded: LoadedStage, split: Split, options: GuideOptions, examples: list[Example]) -> list[Look]:
    """What the student of a run makes of each example."""
    if not examples:
        return []
    stored = split.whole.__getitems__([example.number for example in examples])
    batch = InputTransform(loaded.contract, loaded.device)(stored)
    target = torch.tensor([example.target for example in examples], device=loaded.device)
    maps = make_guide(options, loaded.model).attribute(batch.images, target)
    with torch.no_grad():
        logits = loaded.model(batch.images).float()
    several = split.whole.multi_label
    scores = (logits.sigmoid() if several else logits.softmax(1)).gather(1, target[:, None])[:, 0].tolist()
    boxes = of_class(batch.boxes, target)
    ignore = None if batch.ignore is None else of_class(batch.ignore, target)
    energy = energy_in_box(maps, boxes, loaded.size, ignore).tolist()
    glow = glowing(stored.images, heat_map(maps, (stored.images.shape[2], stored.images.shape[3])))
    found = []
    for i, guess in enumerate(logits.argmax(1).tolist()):
        known = _covered(boxes, i) and energy[i] == energy[i]
        right = scores[i] >= 0.5 if several else guess == examples[i].target
        predicted = None if several else loaded.classes[guess]
        found.append(Look(data_uri(glow[i], SIDE), energy[i] if known else None, scores[i], predicted, right))
    return found


def _covered(boxes: Boxes, i: int) -> bool:
    return bool(boxes.offsets[i + 1] > boxes.offsets[i])
