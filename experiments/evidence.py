"""The comparisons in docs/results.md, trained from the ground up on the CPU; each writes its rows as JSON.

    python experiments/evidence.py shortcut SRC OUT [SEED ...]                  docs/results/shortcut.json
    python experiments/evidence.py shortcut SRC OUT [SEED ...] --teacher dfr    the same file's rows of that teacher
    python experiments/evidence.py cifar SRC OUT [SEED ...]                     docs/results/cifar.json

SRC holds mnist/ (IDX files) and cifar10/ (as `debiaskd prepare cifar` reads it), for `cifar` also weights/ with
cifar10_resnet56*.th, and voc2012_sample/ (Pascal VOC). OUT gets data, runs and rows.

Every model is a run of `debiaskd.training`, as `debiaskd train` makes one. The epoch is chosen on validation images,
test images are looked at once, at the end. Interrupted and started again it goes on; seeds may run side by side, and
whoever finds all of them done writes the result. With --teacher only the rows of that teacher are trained; they replace
those in the file, which keeps the environment of the others beside theirs.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from debiaskd.cli import doctor  # noqa: E402
from debiaskd.data import prepare  # noqa: E402
from debiaskd.data.sources import mnist  # noqa: E402
from debiaskd.evaluation.evaluate import evaluate_run  # noqa: E402
from debiaskd.evaluation.probe import probe_run  # noqa: E402
from debiaskd.evaluation.trust import read_judged, to_hex  # noqa: E402
from debiaskd.pipeline.stages import Pipeline  # noqa: E402
from debiaskd.recipe import read  # noqa: E402
from debiaskd.reweight import ErrorSetWarning  # noqa: E402
from debiaskd.training.fabric import launch  # noqa: E402
from debiaskd.utils import files  # noqa: E402

SEEDS = (0, 1, 2)
Document = dict[str, Any]


#: MNIST's digits on CIFAR-10's photographs: the data, what all students have in common, and the teachers.
PICTURES: Document = {"size": 32, "seed": 0, "agreement": 0.9, "train": 10000, "val": 600, "test": 2000}
SCHEDULE: Document = {
    "epochs": 8,
    "batch": 64,
    "optimizer": "adamw",
    "learning_rate": 3e-3,
    "shape": "cosine",
    "warmup": 1,
}
STUDENT: Document = {
    "data": {"flip": False},
    "student": {"name": "small/16/1,32,64,64/1"},
    "schedule": SCHEDULE,
    "selection": {"rule": "worst_group", "every": 2},
    "compute": {"accelerator": "cpu", "log_every": 40},
}
TEACHER: Document = {"name": "small/32/1,64,128,128/1", "schedule": {**SCHEDULE, "epochs": 10}}
#: Each teacher's stage, and the method of the run that has it: dfr refits the last layer of erm.
TEACHERS = {"erm": ("dfr", "teacher-erm"), "dfr": ("dfr", "teacher"), "group_dro": ("group_dro", "teacher")}
NONE, ONE, ALL = (None,), ("group_dro",), ("group_dro", "dfr", "erm")
CID: Document = {"kd": {}, "sample": {"weight": 1}, "relation": {"weight": 1}, "backdoor": {"start": 2}}
EVERYTHING: Document = {
    "match": {},
    "guide": {"weight": 0.1},
    **{name: {**o, "weight": 0.1} for name, o in CID.items()},
}
SMALLER: Document = {"student": {"name": "small/8/1,16,32,32/1"}}
SIMKD: Document = {"terms": {"match": {}}, "transplant": {"projector": "depthwise"}}


ERRORS: Document = {"method": "errors", "up": 50, "epochs": 1}


def dett(up: float) -> Document:
    return {**SIMKD, "weights": {**ERRORS, "up": up}}


def reweighted(terms: Document, *names: str, up: float = 50) -> Document:
    """`terms`, of which `names` count a briefly trained student's mistakes `up` times, as DeTT does."""
    weighted = {name: {**terms[name], "weighted": True} for name in names}
    return {"terms": {**terms, **weighted}, "weights": {**ERRORS, "up": up}}


def guided(share: float) -> Document:
    return {"terms": {"supervised": {}, "guide": {"weight": 0.1}}, "data": {"annotated_fraction": share}}


#: Name to what it adds to `STUDENT`, and the teachers that it is tried with.
METHODS: dict[str, tuple[Document, tuple[str | None, ...]]] = {
    "erm": ({"terms": {"supervised": {}}}, NONE),
    "kd": ({"terms": {"kd": {}}}, ALL),
    "dett": (dett(50), ALL),
    "simkd": (SIMKD, ONE),
    "cid": ({"terms": CID}, ONE),
    "guided": (guided(0.1), NONE),
    "dett+guided+cid": ({**dett(50), **guided(0.1), "terms": EVERYTHING}, ONE),
    "kd + sample": ({"terms": {name: CID[name] for name in ("kd", "sample")}}, ONE),
    "kd + sample + relation": ({"terms": {name: CID[name] for name in ("kd", "sample", "relation")}}, ONE),
    **{f"dett, λ = {up}": (dett(up), ONE) for up in (5, 20, 200)},
    **{f"guided, {share:.0%} of the boxes": (guided(share), NONE) for share in (0.01, 1.0)},
    **{f"kd, λ = {up}": (reweighted({"kd": {}}, "kd", up=up), ONE) for up in (5, 20, 50)},
    "cid, its backdoor term reweighted": (reweighted(CID, "backdoor"), ONE),
    "cid, reweighted": (reweighted(CID, "kd", "sample", "backdoor"), ONE),
    "dett+guided+cid, reweighted": (
        {**dett(50), **guided(0.1), **reweighted(EVERYTHING, "match", "kd", "sample", "backdoor")},
        ONE,
    ),
    "kd, smaller student": ({"terms": {"kd": {}}, **SMALLER}, ONE),
    "dett, smaller student": ({**dett(50), **SMALLER}, ONE),
}
#: CIFAR-10 from a real ResNet-56. CID's weights are those of the paper's recipes (recipes/cifar100_cid_*.yaml).
CIFAR: Document = {
    # Not mirrored: a cached teacher knows but a few views of an image, and students without one would see more.
    "data": {"train": "train[:90%]", "validation": "train[90%:]", "test": "test", "flip": False},
    "student": {"name": "cifar/resnet20"},
    "schedule": {
        "epochs": 10,
        "batch": 64,
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "weight_decay": 5e-4,
        "shape": "cosine",
        "warmup": 1,
    },
    "selection": {"rule": "accuracy", "every": 2},
    "compute": {"accelerator": "cpu", "log_every": 40},
}
CIFAR_METHODS: dict[str, Document] = {
    "plain": {"supervised": {}},
    "kd": {"supervised": {}, "kd": {}},
    "cid": {"kd": {}, "sample": {"weight": 33}, "relation": {"weight": 0.1}, "backdoor": {"start": 3}},
}
#: Where the features of students of CIFAR-10 are tried: so many digits, and VOC's images at this size.
ELSEWHERE: Document = {"digits": 4000, "voc_size": 64}


class Shortcut:
    """Teachers × methods, and what single parts do."""

    settings: ClassVar[Document] = {"pictures": PICTURES, "student": STUDENT, "teacher": TEACHER, "methods": METHODS}

    def __init__(self, source: Path, out: Path) -> None:
        self.out, self.folder = out, out / "data"
        prepare("mnist_on_cifar", source, self.folder, **PICTURES)

    def runs(self, seed: int) -> Iterator[tuple[Document, Path, str, Document]]:
        """(what a row says of itself, run, stage, recipe)."""
        for teacher, (method, stage) in TEACHERS.items():
            recipe = {**copy.deepcopy(STUDENT), "terms": {"kd": {}}}  # its student learns nothing to speak of
            recipe["schedule"] = {**SCHEDULE, "epochs": 1, "warmup": 0}
            recipe["teacher"] = {**copy.deepcopy(TEACHER), "method": method}
            if method == "dfr":  # the other half selects the student's epoch
                recipe["teacher"]["validation_share"] = 0.5
            yield {"method": "teacher", "teacher": teacher}, self._taught(seed, method), stage, recipe
        for name, (added, teachers) in METHODS.items():
            for teacher in teachers:
                recipe = copy.deepcopy({**STUDENT, **added})
                recipe["data"] = {**STUDENT["data"], **recipe["data"]}
                if teacher is not None:
                    method, stage = TEACHERS[teacher]
                    weights = self._taught(seed, method) / stage / "model.safetensors"
                    recipe["teacher"] = {"name": TEACHER["name"], "weights": str(weights), "cache": "fp32"}
                run = self.out / re.sub(r"[^\w+=]+", "-", f"{seed} {name} {teacher or 'alone'}")
                yield {"method": name, "teacher": teacher}, run, "student", recipe

    def _taught(self, seed: int, method: str) -> Path:
        return self.out / f"{seed}-teacher-{method}"

    def further(self, run: Path, stage: str) -> Document:
        return {}


class Cifar:
    """A ResNet-20 that is re-initialised, and what its features are worth elsewhere."""

    settings: ClassVar[Document] = {"student": CIFAR, "methods": CIFAR_METHODS, "elsewhere": ELSEWHERE}

    def __init__(self, source: Path, out: Path) -> None:
        self.out, self.folder, self.weights = out, out / "data", source / "weights"
        prepare("cifar", source / "cifar10", self.folder)
        _digits(source / "mnist", out / "digits", ELSEWHERE["digits"])
        prepare("folder", out / "digits", out / "mnist", size=32)
        prepare("voc", source / "voc2012_sample", out / "voc", size=ELSEWHERE["voc_size"])

    def runs(self, seed: int) -> Iterator[tuple[Document, Path, str, Document]]:
        (teacher,) = self.weights.glob("cifar10_resnet56*.th")
        for name, terms in CIFAR_METHODS.items():
            recipe = copy.deepcopy({**CIFAR, "terms": terms})
            if "kd" in terms:
                recipe["teacher"] = {"name": "cifar/resnet56", "weights": str(teacher), "cache": "fp32"}
            yield {"method": name}, self.out / f"{seed}-{name}", "student", recipe

    def further(self, run: Path, stage: str) -> Document:
        """Linear probes: accuracy on ten digits, mean average precision on VOC's classes."""
        digits, _ = probe_run(run, stage, str(self.out / "mnist"), ("train[:50%]", "train[50%:]"))
        voc, _ = probe_run(run, stage, str(self.out / "voc"), ("trainval[:50%]", "trainval[50%:]"))
        return {"mnist_accuracy": digits["figures"]["accuracy"], "voc_map": voc["figures"]["map"]}


def _digits(source: Path, folder: Path, count: int) -> None:
    """The first `count` digits as PNG files, in a folder a class."""
    from PIL import Image

    images, labels = next(iter(mnist.read(source).values()))
    for number, (image, label) in enumerate(zip(images[:count], labels[:count])):
        path = folder / str(int(label)) / f"{number:05d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, lambda unfinished, image=image: Image.fromarray(image).save(unfinished, "PNG"))


def train(recipe: Document, seed: int, data: Path, run: Path, only: str = "student") -> None:
    """Train a run; `only="teacher"`: no further than its teacher."""
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**recipe, "seed": seed, "data": {**recipe["data"], "path": str(data)}}))
    found = read(path)
    pipeline = Pipeline(found, run, launch(found.compute), lambda *news: None)
    if only == "teacher":
        pipeline.teacher_alone()
    else:
        pipeline.student()


def measured(run: Path, stage: str, out: Path) -> Document:
    """Test metrics of a stage, and which images it predicts rightly, by which verdicts compare methods on the same
    images; their groups go to `out/test_groups.json`."""
    document, _ = evaluate_run(run, stage, None, None)
    row = {key: value for key, value in document["figures"].items() if not key.startswith("iou_")}
    judged = read_judged(run / document["images"]) if document["images"] else None
    if judged is not None:
        row["correct"] = to_hex(judged.correct)
        groups = torch.zeros_like(judged.index) if judged.groups is None else judged.groups
        files.write_json(out / "test_groups.json", groups.tolist())
    return {"epoch": document["epoch"], **row}


def rows_of(experiment: Any, seed: int, teacher: str | None) -> list[Document]:
    """Of one seed, and of one teacher or of all; what is there already is not done again."""
    path = experiment.out / f"rows-{seed}.json"
    rows: list[Document] = files.read_json(path) or []
    started = time.perf_counter()
    for said, run, stage, recipe in experiment.runs(seed):
        if teacher not in (None, said.get("teacher")) or any({**row, **said} == row for row in rows):
            continue
        train(recipe, seed, experiment.folder, run)
        row = {**said, "seed": seed, **measured(run, stage, experiment.out), **experiment.further(run, stage)}
        rows.append(row)
        files.write_json(path, rows)
        print(f"{time.perf_counter() - started:6.0f} s {said}, {seed}", flush=True)
    return rows


def main(name: str, source: Path, out: Path, seeds: tuple[int, ...], teacher: str | None) -> None:
    for noisy in ("lightning.fabric", "lightning_fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.simplefilter("ignore", ErrorSetWarning)
    experiment = {"shortcut": Shortcut, "cifar": Cifar}[name](source, out)
    for seed in seeds:
        rows_of(experiment, seed, teacher)
    everything = [files.read_json(out / f"rows-{seed}.json") or [] for seed in SEEDS]
    if len({len(rows) for rows in everything}) > 1 or not everything[0]:
        return
    environment = {**doctor.environment(), "threads": torch.get_num_threads()}
    rows = [row for rows in everything for row in rows]
    path = ROOT / "docs" / "results" / f"{name}.json"
    document: Document = {"rows": rows, "settings": experiment.settings, "seeds": SEEDS, "environment": environment}
    document["test_groups"] = files.read_json(out / "test_groups.json")
    if teacher is not None:
        document = files.read_json(path)
        kept = [row for row in document["rows"] if row["teacher"] != teacher]
        renewed = {**document.get("renewed", {}), teacher: environment}
        document["test_groups"] = files.read_json(out / "test_groups.json")
        document |= {"rows": kept + rows, "settings": experiment.settings, "renewed": renewed}
    files.write_json(path, document)


if __name__ == "__main__":
    words, only = sys.argv[1:], None
    if "--teacher" in words[:-1]:
        at = words.index("--teacher")
        only, words = words[at + 1], words[:at] + words[at + 2 :]
    if len(words) < 3 or words[0] not in ("shortcut", "cifar") or only not in (None, *TEACHERS):
        sys.exit(__doc__)
    main(words[0], Path(words[1]), Path(words[2]), tuple(map(int, words[3:])) or SEEDS, only)
