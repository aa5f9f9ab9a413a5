"""Load the networks of finished runs and evaluate them on a split."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from debiaskd.bias import are_found
from debiaskd.data import DataError
from debiaskd.evaluation.trust import faithfulness, first_of_each, trusted, write_judged
from debiaskd.models.registry import load_weights
from debiaskd.recipe import Network, RecipeError
from debiaskd.terms import Ranks
from debiaskd.training.batches import Split, SplitLoader, open_split
from debiaskd.training.fabric import autocast
from debiaskd.training.rebuild import design_of_stage
from debiaskd.training.run import STAGE, RunError, Stage, data_fingerprint, digest, finished, open_run
from debiaskd.training.validation import Evaluator, Judged, attribution_options, has_boxes
from debiaskd.utils import files
from debiaskd.version import __version__

#: Increased when the meaning of a metric changes, so that reports evaluate again.
FIGURES = 3
#: IoU threshold where validation gave none, as in the public code of Rao et al. 2023.
THRESHOLD = 0.5


class LoadedStage:
    """The network of a finished stage.

    Attributes:
        folder, name: of the run; of the stage.
        model: in evaluation mode, on `device`.
        recipe, stage: the run's.
        network: how it is built.
        classes: names.
        contract: what it reads.
        size: (height, width) of that.
    """

    def __init__(self, folder: Path, stage: str = "student", data: str | None = None) -> None:
        self.folder, self.name = folder, stage
        self.recipe = open_run(folder)
        if data is not None:
            here = dataclasses.replace(self.recipe.data, path=data, url=None)
            self.recipe = dataclasses.replace(self.recipe, data=here)
        self.stage = finished(folder, stage)
        if not self.stage.model.exists():
            raise RunError(f"{self.stage.folder}: has no model; try one of student, pretraining, teacher")
        about, names = _header(self.stage)
        self.design = design_of_stage(self.recipe, about, stage, names)
        self.classes: list[str] = about["classes"]
        self.network: Network = self.design.network
        self.contract = self.design.contract
        self.size = self.contract.size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = self.design.build()
        load_weights(model, self.stage.model)
        self.model = model.to(self.device).eval()

    def loader(self, split: Split, batch: int = 64) -> SplitLoader:
        return SplitLoader(
            split,
            self.recipe.data,
            training=False,
            batch=batch,
            ranks=Ranks(),
            device=self.device,
            contract=self.contract,
        )


def _header(stage: Stage) -> tuple[dict[str, Any], set[str]]:
    """Metadata of a stage's weights, and the names of the tensors."""
    import json

    from safetensors import safe_open

    with safe_open(stage.model, "pt") as file:
        return json.loads(file.metadata()["debiaskd"]), set(file.keys())


def evaluation_split(loaded: LoadedStage, split: str | None) -> Split:
    """Open the named split, or the recipe's test split.

    Raises:
        RecipeError: no such split.
        RunError: it has a class that the run does not know; it may lack some, and have them in another order.
    """
    data = loaded.recipe.data
    option = None if split is None else "--split"
    found = open_split(dataclasses.replace(data, test=split or data.test), "test", option=option)
    whole = found.whole
    if not set(whole.classes) <= set(loaded.classes):
        theirs = _shorten(whole.classes)
        raise RunError(
            f"{loaded.folder}: knows other classes than {data.path}: {_shorten(loaded.classes)}; not {theirs}"
        )
    if list(whole.classes) != loaded.classes:  # some of them, or in another order: the model's numbers are what counts
        whole.number_among(loaded.classes)
        found.target, found.boxes = whole.target[found.numbers], whole.boxes[found.numbers]
        found.num_classes = len(whole.classes)
    return found


def _shorten(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def evaluate_run(
    folder: Path, stage: str, split: str | None, data: str | None, *, faithful: int | None = None
) -> tuple[dict[str, Any], Path]:
    """Evaluate a stage of a run; return (metrics with their provenance, the file that was written).

    Args:
        folder, stage: of the run.
        split, data: that it is measured on; None: the recipe's.
        faithful: on so many images, whether its maps are faithful (`debiaskd.metrics.deletion`); None: not measured.

    Raises:
        RunError, RecipeError, DataError, NetworkError: as their names say.
    """
    loaded = LoadedStage(folder, stage, data)
    evaluated = StageEvaluation(loaded, evaluation_split(loaded, split))
    document = evaluated.measure(faithful=faithful)
    evaluated.write(document)
    return document, evaluated.path


def _training_data(loaded: LoadedStage, otherwise: str) -> str:
    """The fingerprint of the data that the run was trained on."""
    found = (stage.inputs.get("data") for stage in _finished_stages(loaded))
    return next((one for one in found if isinstance(one, str)), otherwise)


def _training_groups(loaded: LoadedStage, names: Sequence[str], data: str) -> Tensor | None:
    """int64 [M], the run's training images by number in the names of the data that is measured; None where nothing is
    known of them, or no group has its name there."""
    found = [stage.facts["training_groups"] for stage in _finished_stages(loaded) if stage.facts.get("training_groups")]
    known: dict[str, int] = found[0] if found else _count_training_groups(loaded, data)
    counts = torch.tensor([known.get(name, 0) for name in names])
    return torch.arange(len(names)).repeat_interleave(counts) if bool(counts.any()) else None


def _count_training_groups(loaded: LoadedStage, data: str) -> dict[str, int]:
    """Of a run that did not save its training images' groups: from its data, where that can still be read."""
    places = [open_run(loaded.folder).data]
    if data == _training_data(loaded, data):
        places.append(loaded.recipe.data)
    for place in places:
        with suppress(RecipeError, DataError, OSError):
            split = open_split(place, "train")
            if split.groups is not None:
                names = split.whole.groups
                return dict(zip(names, split.groups.bincount(minlength=len(names)).tolist()))
    return {}


def _finished_stages(loaded: LoadedStage) -> list[Stage]:
    """All finished stages of a run, the loaded one first."""
    found = [loaded.stage]
    for path in sorted(loaded.folder.glob(f"*/{STAGE}")):
        with suppress(RunError):  # a damaged one of another name is no matter here
            found += [stage for stage in [Stage.read(path.parent)] if stage is not None]
    return found


class StageEvaluation:
    """Evaluate a loaded model on a split.

    Args:
        loaded, split: see there.
        threshold: of the IoU; None: the one that was best on validation.

    Attributes:
        path: the file in the run's folder that holds it; where it is of other data than the run was trained on, with
            the name and the fingerprint of that.
        data: the fingerprint of the data.
        fingerprint: of all that decides the metrics: weights, images, layer and method of the attributions.
        threshold: of the IoU; None: training computed no attributions, and validation decides it when it is needed.
    """

    def __init__(self, loaded: LoadedStage, split: Split, threshold: float | None = None) -> None:
        self.loaded, self.split = loaded, split
        #: What the model made of each image, once it is measured.
        self.judged: Judged | None = None
        self.guide = attribution_options(loaded.recipe, loaded.name)
        # Not the best on this split: that would be to choose by what is measured.
        figures = loaded.stage.facts.get("figures", {"iou_threshold": None})
        found = figures.get("iou_threshold")
        self.threshold: float | None = THRESHOLD if "iou_threshold" in figures and found is None else found
        if threshold is not None:
            self.threshold = threshold
        self.autocast = partial(autocast, loaded.recipe.compute, loaded.device)
        suffix = "" if loaded.name == "student" else f"-{loaded.name}"
        slug = re.sub(r"[^A-Za-z0-9_.]+", "-", split.name.replace(":]", ":100%]")).strip("-")
        path, self.data = loaded.recipe.data.path, data_fingerprint(loaded.recipe.data.path)
        if self.data != _training_data(loaded, self.data):  # a file of its own, beside that of the run's own data
            slug += f"-{re.sub(r'[^A-Za-z0-9_.]+', '-', Path(path).resolve().name)}-{self.data[:8]}"
        self.path = loaded.folder / f"evaluation-{slug}{suffix}.json"
        self.fingerprint = digest(
            {
                "made_by": f"debiaskd {__version__}",
                "figures": FIGURES,
                "weights": loaded.stage.outputs.get(loaded.stage.model.name),
                "data": self.data,
                "splits": [split.name, loaded.recipe.data.train, loaded.recipe.data.seed],
                "guide": dataclasses.asdict(self.guide),
                "threshold": self.threshold,
                **({"masks": True} if loaded.recipe.data.masks else {}),
                **({} if loaded.recipe.compute.precision == "32" else {"precision": loaded.recipe.compute.precision}),
            }
        )

    def found(self) -> dict[str, Any] | None:
        """Read an earlier evaluation with the same fingerprint; None if there is none."""
        try:
            document = files.read_json(self.path)
        except (ValueError, OSError):
            return None
        same = isinstance(document, dict) and document.get("fingerprint") == self.fingerprint
        return document if same else None

    def _best_threshold(self) -> float:
        """The IoU threshold that is best on the run's validation images."""
        with suppress(RecipeError, DataError, OSError):  # which may not be there any more
            validation = open_split(open_run(self.loaded.folder).data, "validation")
            if has_boxes(validation):
                loader = self.loaded.loader(validation)
                figures = Evaluator(loader, None, self.guide, autocast=self.autocast)(self.loaded.model)
                if figures["iou_threshold"] == figures["iou_threshold"]:
                    return figures["iou_threshold"]
        return THRESHOLD

    @property
    def images(self) -> Path:
        """The file beside `path` of what the model made of each image: `debiaskd.evaluation.trust.read_judged`."""
        return self.path.with_suffix(".safetensors")

    def write(self, document: dict[str, Any]) -> None:
        """Write what `measure` gave, and what it is made of.

        Raises:
            OSError: it cannot be written.
        """
        if self.judged is not None:
            write_judged(self.images, self.judged)
        files.write_json(self.path, document)

    def measure(self, *, faithful: int | None = None) -> dict[str, Any]:
        """The metrics, and what they are of.

        Args:
            faithful: images that the faithfulness of maps is measured on; None: it is not.
        """
        loaded = self.loaded
        loader = loaded.loader(self.split)
        groups = None if self.split.groups is None else _training_groups(loaded, self.split.whole.groups, self.data)
        threshold = self._best_threshold() if self.threshold is None and has_boxes(self.split) else self.threshold
        evaluation = Evaluator(loader, groups, self.guide, threshold, autocast=self.autocast)
        figures = evaluation(loaded.model)
        self.judged, found = evaluation.judged, are_found(self.split.whole.groups)
        if self.judged is not None:
            figures |= trusted(self.judged, found=found)
        if faithful is not None:
            if self.split.whole.multi_label:
                raise RecipeError("--faithfulness: needs one class an image, here it may be several")
            few = loaded.loader(first_of_each(self.split, faithful), 16)
            figures |= faithfulness(loaded.model, few, self.guide)
        return {
            "run": str(loaded.folder),
            "stage": loaded.name,
            "epoch": loaded.stage.facts.get("epoch"),
            "selection": loaded.stage.facts.get("selection"),
            "data": {"path": loaded.recipe.data.path, "fingerprint": self.data},
            "split": self.split.name,
            "pictures": len(self.split),
            "groups": list(self.split.whole.groups),
            "groups_are": None if self.split.groups is None else "found" if found else "known",
            **({"masks": True} if loaded.recipe.data.masks else {}),
            "images": None if self.judged is None else self.images.name,
            "fingerprint": self.fingerprint,
            "figures": {key: value if value == value else None for key, value in figures.items()},
        }
