"""What `debiaskd distill` does with a prepared data set: which method its annotations allow, and the recipes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from debiaskd.data.packed import manifest
from debiaskd.models.registry import NetworkError, build, load_weights

#: Epochs without a budget, images a step, and the gap between average and worst-group accuracy that calls a teacher
#: biased.
EPOCHS, BATCH, GAP = 30, 64, 0.1


@dataclass(frozen=True)
class Findings:
    """What a prepared data set holds.

    Attributes:
        path: the folder.
        classes, groups: names.
        multi_label: whether an image may show several classes.
        counts: images by split; `boxed` of them with known boxes.
        class_counts, group_counts: of the training split.
        size: side of the images.
        splits: train, validation and test as recipes name them.
    """

    path: Path
    classes: tuple[str, ...]
    groups: tuple[str, ...]
    multi_label: bool
    counts: dict[str, int]
    boxed: dict[str, int]
    class_counts: tuple[int, ...]
    group_counts: tuple[int, ...]
    size: int
    splits: dict[str, str]

    @property
    def train(self) -> int:
        """Images to train on."""
        count = self.counts[self.splits["train"].partition("[")[0]]
        return int(0.7 * count) if self.splits["train"].endswith("[:70%]") else count

    @property
    def guided(self) -> bool:
        """Whether training images have boxes."""
        return self.boxed[self.splits["train"].partition("[")[0]] > 0

    def lines(self) -> list[str]:
        """In words, with what follows from it."""
        splits = ", ".join(f"{count} in {name}" for name, count in self.counts.items())
        found = [f"images: {splits}, stored at {self.size}×{self.size}"]
        if any("[" in name for name in self.splits.values()):
            parts = ", ".join(f"{key} on {name}" for key, name in self.splits.items())
            found.append(f"splits: not all are there, so that parts are used: {parts}")
        several = ", several an image" if self.multi_label else ""
        found.append(f"classes: {len(self.classes)}{several} ({_counted(self.classes, self.class_counts)})")
        most, least = max(self.class_counts), min(self.class_counts)
        if least == 0 or most > 3 * least:
            found.append(f"imbalance: the largest class has {most} training images, the smallest {least}")
        if self.groups:
            found.append(f"groups: {len(self.groups)} ({_counted(self.groups, self.group_counts)})")
        else:
            found.append("groups: none; without bias.csv the bias can be neither measured nor debiased by group")
        total = sum(self.boxed.values())
        found.append(f"boxes: {total} images have them" if total else "boxes: none, so nothing is guided")
        return found


def _counted(names: tuple[str, ...], counts: tuple[int, ...], most: int = 8) -> str:
    shown = ", ".join(f"{name}: {count}" for name, count in list(zip(names, counts))[:most])
    return shown + (f", and {len(names) - most} more" if len(names) > most else "")


def find(path: Path) -> Findings:
    """What lies in a prepared folder.

    Raises:
        DataError: it is not prepared.
    """
    document = manifest.read(path)
    splits = document["splits"]
    names = _splits(list(splits))
    train = splits[names["train"].partition("[")[0]]
    return Findings(
        path,
        tuple(document["classes"]),
        tuple(document["groups"]),
        document["multi_label"],
        {name: split["count"] for name, split in splits.items()},
        {name: split["annotated"] if split["boxes"] else 0 for name, split in splits.items()},
        tuple(train["class_counts"]),
        tuple(train["group_counts"]),
        document["options"]["size"],
        names,
    )


def _splits(names: list[str]) -> dict[str, str]:
    """Train, validation and test: those that are there, else parts of others."""
    train = "train" if "train" in names else names[0]
    validation = next((name for name in ("val", "valid", "validation") if name in names), None)
    test = "test" if "test" in names and train != "test" else None
    if validation and test:
        return {"train": train, "validation": validation, "test": test}
    if validation:
        return {"train": train, "validation": f"{validation}[:50%]", "test": f"{validation}[50%:]"}
    if test:
        return {"train": f"{train}[:85%]", "validation": f"{train}[85%:]", "test": test}
    return {"train": f"{train}[:70%]", "validation": f"{train}[70%:85%]", "test": f"{train}[85%:]"}


@dataclass
class Plan:
    """The recipes of a distillation.

    Attributes:
        method: in words.
        why: what led to it, line by line.
        recipes: by run: "teacher" (None: the teacher is given), "plain", "debiased".
    """

    method: str
    why: list[str] = field(default_factory=list)
    recipes: dict[str, dict[str, Any] | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """What the user asks for.

    Args:
        teacher, student: names of networks.
        weights: of the teacher; None: it is trained.
        pretrained: begin from the weights that timm or torchvision publish.
        seed: of everything.
    """

    teacher: str
    student: str
    weights: str | None = None
    pretrained: bool = False
    seed: int = 0


def plan(found: Findings, asked: Asked, out: Path, epochs: int, *, head: str | None = None) -> Plan:
    """Choose a method by what is annotated.

    Args:
        found: what there is.
        asked: what is wanted.
        out: folder of the runs.
        epochs: of each training.
        head: how a given teacher's last layer is made; see `given_head`.
    """
    made = Plan("")
    data = {"path": str(found.path), **found.splits}
    batch = max(2, min(BATCH, found.train // 4))
    rate = 3e-4 if asked.pretrained else 1e-3
    schedule = {"epochs": epochs, "batch": batch, "optimizer": "adam", "learning_rate": rate, "shape": "cosine"}
    base: dict[str, Any] = {"data": data, "schedule": schedule, "seed": asked.seed}
    student = {"name": asked.student, "pretrained": asked.pretrained}
    plain = {"student": student, "terms": {"supervised": {}}}
    made.recipes["plain"] = {**base, **plain}
    if asked.weights is None:
        network = {"name": asked.teacher, "pretrained": asked.pretrained}
        teacher: dict[str, Any] = {**base, "student": network, "terms": {"supervised": {}}}
        if found.groups:
            teacher["weights"] = {"method": "groups", "draw": True}
            teacher["terms"] = {"supervised": {"weighted": True}}
            made.why.append("the teacher is trained with its groups drawn alike, since the groups are known")
        else:
            made.why.append("the teacher is trained on the labels alone, since no groups are known")
        made.recipes["teacher"] = teacher
    else:
        made.recipes["teacher"] = None
    made.recipes["debiased"] = {
        **base,
        "student": student,
        "teacher": _teacher(asked, out, head, bool(found.groups)),
        **_method(found, asked, made),
    }
    return made


def _teacher(asked: Asked, out: Path, head: str | None, grouped: bool) -> dict[str, Any]:
    weights = str(out / "teacher") if asked.weights is None else asked.weights
    found: dict[str, Any] = {"name": asked.teacher, "method": "checkpoint", "weights": weights}
    if head is not None:
        found |= {"head": head, "probe": "groups" if grouped else "plain"}
    return found


def _method(found: Findings, asked: Asked, made: Plan) -> dict[str, Any]:
    terms: dict[str, Any] = {"match": {"weighted": False}}
    keys: dict[str, Any] = {"transplant": {"projector": "depthwise"}}
    if asked.pretrained:
        keys["transplant"] = {"projector": "linear", "init": "least_squares"}
        made.why.append("the student's features are pretrained: its projector starts at the least-squares fit of them")
    words = ["transplanting"]
    if found.groups and not found.multi_label:
        keys["weights"] = {"method": "errors", "up": 50}
        terms["match"] = {"weighted": True}
        words = ["DeTT"]
        made.why.append("groups are known: DeTT, whose student takes the teacher's last layer and weighs its errors")
    else:
        reason = "an image may show several classes" if found.multi_label else "no groups are known"
        made.why.append(f"{reason}: the teacher's last layer is transplanted, and all images count alike")
    if found.guided:
        terms["guide"] = {"layer": "Final", "loss": "energy", "weight": 0.1}
        words.append("guidance")
        made.why.append("training images have boxes: the student's attributions are guided into them")
    made.method = " + ".join(words)
    return {**keys, "terms": terms}


def given_head(asked: Asked, found: Findings) -> str | None:
    """None where the given weights have a last layer for the data's classes, "probe" where one has to be fitted.

    Raises:
        NetworkError: the weights are not those of the network.
    """
    assert asked.weights is not None
    import warnings

    model = build(asked.teacher, len(found.classes), size=(found.size, found.size))
    try:
        load_weights(model, asked.weights)
    except NetworkError:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the last layer stays as it is: it will be fitted
            load_weights(model, asked.weights, to_train=True)
        return "probe"
    return None


def bias_in_words(figures: Mapping[str, float | None], groups: tuple[str, ...]) -> str:
    """How biased a model is: its average and its worst group."""
    average, worst = figures.get("accuracy"), figures.get("worst_group_accuracy")
    if average is None:
        return f"F1 {100 * (figures.get('f1') or 0):.1f} %"
    said = f"{100 * average:.1f} % right on average"
    if worst is None:
        return f"{said}; how biased it is cannot be told without groups"
    known = {name: figures.get(f"group_{g}_accuracy") for g, name in enumerate(groups)}
    lowest = [name for name, value in known.items() if value is not None and value <= worst + 1e-9]
    where = f" ({lowest[0]})" if lowest else ""
    gap = average - worst
    judged = "biased" if gap > GAP else "hardly biased"
    return f"{said}, {100 * worst:.1f} % in its worst group{where}: {judged}, {100 * gap:.1f} points apart"


def no_gain(plain: Mapping[str, float | None], debiased: Mapping[str, float | None]) -> str | None:
    """A warning if the debiased student's worst group is not above the plain one's; else None, as without groups."""
    before, after = plain.get("worst_group_accuracy"), debiased.get("worst_group_accuracy")
    if before is None or after is None or after > before:
        return None
    return (
        f"warning: the debiased student is no better than the plain one in its worst group, {100 * after:.1f} and "
        f"{100 * before:.1f} %: more epochs (--minutes), pretrained weights (--pretrained), or other sample weights "
        "(debiaskd tune on recipe.yaml, --over weights.up=1,5,20,50) may help"
    )
