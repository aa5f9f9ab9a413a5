"""Draw a student's attributions over images, before and after guidance."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from debiaskd.attribution.heat_map import heat_map
from debiaskd.boxes import Boxes
from debiaskd.data import Batch, DataError
from debiaskd.data.packed import manifest
from debiaskd.data.pixels import UnreadableError, decode, fit
from debiaskd.evaluation.evaluate import LoadedStage
from debiaskd.metrics import energy_in_box
from debiaskd.ops.ignore import of_class
from debiaskd.recipe import Recipe, RecipeError
from debiaskd.terms import make_guide
from debiaskd.terms.guidance import GuideOptions
from debiaskd.training.batches import InputTransform, Split, open_split
from debiaskd.training.run import RunError, finished
from debiaskd.training.validation import attribution_options
from debiaskd.utils import files

_NUMBERED = re.compile(r"(?P<split>[^/:]+):(?P<number>\d+)")


@dataclass
class Example:
    """An image to explain: its name, pixels uint8 [3,S,S], boxes and labels where known."""

    name: str
    image: Tensor
    boxes: Boxes
    target: Tensor | None


@dataclass
class Explanation:
    """One model's attribution of one class: `map` float32 [S,S] in [0,1], its probability, the energy in its boxes."""

    heading: str
    map: Tensor
    score: float
    epg: float | None


def explain_run(
    folder: Path,
    images: Sequence[str],
    *,
    target: str | None = None,
    before: Path | None = None,
    out: Path | None = None,
    data: str | None = None,
) -> list[Path]:
    """One PNG for each image and class: the image with the class's boxes, and the maps of each model.

    Args:
        folder: of the run.
        images: files, whose boxes are known if the run's data holds an image of that name, or images of the run's
            data, such as "val:12".
        target: a class's name or number; None: the labels of an image where they are known, else what the student
            predicts.
        before: another run, whose student is shown first; None: this run's pretraining, if it has one.
        out: folder; None: RUN/explanations.
        data: where the prepared data lies now.

    Raises:
        RunError, RecipeError, DataError, NetworkError: as their names say; for an image or a class that is none, too.
    """
    after = LoadedStage(folder, "student", data)
    models = [("after guidance" if after.recipe.terms.guide else "student", after)]
    if before is not None:
        models.insert(0, (f"before: {before.name}", LoadedStage(before, "student", data)))
    elif after.recipe.pretraining is not None:
        finished(folder, "pretraining")
        models.insert(0, ("before guidance", LoadedStage(folder, "pretraining", data)))
    if len({tuple(model.classes) for _, model in models}) > 1:
        raise RunError(f"{before}: knows other classes than {folder}")
    known, options = _RunData(after.recipe), attribution_options(after.recipe, "student")  # all models in the same way
    target_number = None if target is None else _class(target, after.classes)
    written: list[Path] = []
    for text in images:
        example = known.picture(text, after.size[0])
        for k in [target_number] if target_number is not None else _targets(example, after):
            seen = [_explain(heading, model, example, k, options) for heading, model in models]
            where = out or folder / "explanations"
            where.mkdir(parents=True, exist_ok=True)
            path = _unused_path(where / f"{_slug(example.name)}-{_slug(after.classes[k])}", written)
            figure = _figure(example, of_class(example.boxes, torch.tensor([k])), after.classes[k], seen)
            files.write(path, lambda unfinished, figure=figure: figure.savefig(unfinished, format="png", dpi=100))  # type: ignore[misc]
            written.append(path)
    return written


def _unused_path(path: Path, written: Sequence[Path]) -> Path:
    """A path that no other image of this call has; images in different folders may share a name."""
    names = (f"{path.name}{more}.png" for more in ("", *(f"-{n}" for n in range(2, len(written) + 2))))
    return next(path.with_name(name) for name in names if path.with_name(name) not in written)


class _RunData:
    """The run's data, as far as it is available, for boxes and labels."""

    def __init__(self, recipe: Recipe) -> None:
        self.data, self.splits, self.fit = recipe.data, {}, "squash"
        with suppress(DataError):
            self.fit = manifest.read(Path(recipe.data.path))["options"]["fit"]
        for key in ("train", "validation", "test"):
            try:
                split = open_split(recipe.data, key)
            except RecipeError:
                continue  # an image file needs none
            self.splits[split.whole.split] = split

    def picture(self, text: str, side: int) -> Example:
        path = Path(text)
        numbered = _NUMBERED.fullmatch(text)
        if numbered is not None and not path.exists():
            return self._numbered(numbered["split"], int(numbered["number"]))
        try:
            pixels, _, _ = fit(decode(path), side, self.fit)
        except (UnreadableError, OSError) as error:
            raise RecipeError(f"{text}: {error}") from None
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        for split in self.splits.values():
            places = [i for i, name in enumerate(split.whole.paths()) if Path(name).name == path.name]
            if len(places) == 1:
                (boxes,) = [split.whole.boxes[torch.tensor(places)]]
                boxes = boxes.resize(split.whole.size, (side, side))
                return Example(path.stem, image, boxes, split.whole.target[places[0]])
        return Example(path.stem, image, Boxes.from_lists([None]), None)

    def _numbered(self, name: str, number: int) -> Example:
        if name not in self.splits:
            split = Split(dataclasses.replace(self.data, test=name), "test")
        else:
            split = self.splits[name]
        if number >= len(split.whole):
            raise RecipeError(f"{name}:{number}: there are {len(split.whole)} images")
        batch = split.whole.__getitems__([number])
        return Example(f"{name}-{number}", batch.images[0], batch.boxes, batch.target[0])


def _class(text: str, classes: Sequence[str]) -> int:
    if text in classes:
        return list(classes).index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    raise RecipeError(f"--target: must be a class's name or number, one of {', '.join(classes)}; got {text!r}")


def _targets(example: Example, loaded: LoadedStage) -> list[int]:
    if example.target is not None:
        if example.target.dim() == 0:
            return [int(example.target)]
        labels: list[int] = example.target.nonzero()[:, 0].tolist()
        if labels:
            return labels
    with torch.no_grad():
        return [int(loaded.model(_model_input(loaded, example).images).argmax(1))]


def _model_input(loaded: LoadedStage, example: Example) -> Batch:
    batch = Batch(
        example.image[None].contiguous(memory_format=torch.channels_last), torch.zeros(1).long(), example.boxes
    )
    return InputTransform(loaded.contract, loaded.device)(batch)


def _explain(heading: str, loaded: LoadedStage, example: Example, k: int, options: GuideOptions) -> Explanation:
    batch = _model_input(loaded, example)
    target = torch.tensor([k], device=loaded.device)
    try:
        guide = make_guide(options, loaded.model)
    except (ValueError, TypeError) as error:
        raise RunError(f"{loaded.stage.folder}: cannot be looked at as the other run is ({error})") from None
    maps = guide.attribute(batch.images, target)
    with torch.no_grad():
        logits = loaded.model(batch.images)[0]
    several = logits.sigmoid() if example.target is not None and example.target.dim() else logits.softmax(0)
    boxes = of_class(batch.boxes, target)
    share = energy_in_box(maps, boxes, loaded.size)
    height, width = example.image.shape[1:]
    heat = heat_map(maps, (height, width))[0]
    known = bool(boxes.annotated[0]) and len(boxes.coords) > 0
    return Explanation(heading, heat, float(several[k]), float(share[0]) if known else None)


def _figure(example: Example, boxes: Boxes, name: str, seen: Sequence[Explanation]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    picture = example.image.permute(1, 2, 0).numpy()
    figure = Figure(figsize=(3.2 * (1 + len(seen)), 3.6), layout="constrained")
    panels = figure.subplots(1, 1 + len(seen), squeeze=False)[0]
    panels[0].imshow(picture)
    panels[0].set_title(f"{example.name}: {name}", fontsize=9)
    for axes, one in zip(panels[1:], seen):
        axes.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=400)
        heat = one.map.numpy()
        axes.imshow(heat, cmap="inferno", alpha=heat, vmin=0, vmax=1)
        share = "" if one.epg is None else f", {100 * one.epg:.0f} % in box"
        axes.set_title(f"{one.heading}: p = {one.score:.2f}{share}", fontsize=9)
    for axes in panels:
        axes.set_axis_off()
        for x0, y0, x1, y1 in boxes.coords.tolist():
            axes.add_patch(
                Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor="lime", linewidth=1.5)
            )
    return figure


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")
