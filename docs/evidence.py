"""The comparison in docs/results.md: MNIST digits on CIFAR-10 photographs, teachers × methods × seeds.

    debiaskd prepare mnist_on_cifar SRC DATA --size 48 --train 5000
    python docs/evidence.py DATA OUT        trains everything below OUT, writes docs/results/evidence.json

Each model is a run of `debiaskd.training`, as `debiaskd train` makes one; the epoch is chosen by the worst group of the
validation pictures, and the test pictures are looked at once, at the end. Interrupted and started again it goes on.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from debiaskd import doctor, files  # noqa: E402
from debiaskd.recipe import read  # noqa: E402
from debiaskd.reweight import ErrorSetWarning  # noqa: E402
from debiaskd.training.fabric import launch  # noqa: E402
from debiaskd.training.loaded import evaluate_run  # noqa: E402
from debiaskd.training.stages import Chain  # noqa: E402

RESULT = ROOT / "docs" / "results" / "evidence.json"
SEEDS = (0, 1, 2)
SCHEDULE = {"epochs": 12, "batch": 50, "optimizer": "adamw", "learning_rate": 2e-3, "shape": "cosine", "warmup": 1}
TEACHERS = ("erm", "group_dro", "dfr")
BASE: dict[str, Any] = {
    "data": {"flip": False},
    "student": {"name": "small/8,16,32,32"},
    "schedule": SCHEDULE,
    "selection": {"rule": "worst_group"},
    "compute": {"accelerator": "cpu", "log_every": 40},
}
TRANSPLANT: dict[str, Any] = {"transplant": {"projector": "depthwise"}}
ERRORS: dict[str, Any] = {"weights": {"method": "errors", "up": 50, "epochs": 1}}
CID: dict[str, Any] = {"kd": {}, "sample": {"weight": 1}, "relation": {"weight": 1}, "backdoor": {"start": 2}}
SMALL_CID = {name: {**options, "weight": 0.1} for name, options in CID.items()}

#: Name to what it adds to BASE. Those with terms of a teacher are run for each of TEACHERS.
METHODS: dict[str, dict[str, Any]] = {
    "erm": {"terms": {"supervised": {}}},
    "guided": {"terms": {"supervised": {}, "guide": {"weight": 0.1}}, "data": {"annotated_fraction": 0.1}},
    "kd": {"terms": {"kd": {}}},
    "simkd": {"terms": {"match": {}}, **TRANSPLANT},
    "dett": {"terms": {"match": {}}, **TRANSPLANT, **ERRORS},
    "cid": {"terms": CID},
    "dett+guided+cid": {
        "terms": {"match": {}, "guide": {"weight": 0.1}, **SMALL_CID},
        "data": {"annotated_fraction": 0.1},
        **TRANSPLANT,
        **ERRORS,
    },
}
#: The same for one teacher each: what λ does, what each part of CID adds, how many boxes it takes.
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"dett, λ = {up}": {**METHODS["dett"], "weights": {**ERRORS["weights"], "up": up}} for up in (5, 20, 200)},
    "kd + sample": {"terms": {"kd": {}, "sample": {"weight": 1}}},
    "kd + sample + relation": {"terms": {name: CID[name] for name in ("kd", "sample", "relation")}},
    "cid, exact": {"terms": {**CID, "backdoor": {"start": 2, "mode": "exact"}}},
    "guided, 1 % of the boxes": {**METHODS["guided"], "data": {"annotated_fraction": 0.01}},
    "guided, all boxes": {**METHODS["guided"], "data": {"annotated_fraction": 1.0}},
}
OF_TEACHER = ("match", "kd", "sample", "relation", "backdoor")


def taught(method: dict[str, Any]) -> bool:
    return any(term in method["terms"] for term in OF_TEACHER)


def jobs() -> list[tuple[str, str | None, int, dict[str, Any]]]:
    """(method, teacher, seed, recipe), a seed at a time."""
    found: list[tuple[str, str | None, int, dict[str, Any]]] = []
    for seed in SEEDS:
        for name, method in METHODS.items():
            for teacher in TEACHERS if taught(method) else (None,):
                found.append((name, teacher, seed, method))
        for name, method in VARIANTS.items():
            found.append((name, "group_dro" if taught(method) else None, seed, method))
    return found


def recipe_of(method: dict[str, Any], teacher: str | None, seed: int, data: Path, out: Path) -> dict[str, Any]:
    document = copy.deepcopy({**BASE, **method, "seed": seed})
    document["data"] = {**BASE["data"], **document["data"], "path": str(data)}
    if teacher is not None:
        document["teacher"] = {
            "name": "small/24,48,96,96",
            "method": "checkpoint",
            "weights": str(teacher_run(out, teacher, seed) / "teacher" / "model.safetensors"),
            "cache": "fp32",
        }
    return document


def teacher_run(out: Path, teacher: str, seed: int) -> Path:
    return out / f"teacher-{teacher}-{seed}"


def train(document: dict[str, Any], folder: Path) -> None:
    path = folder.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(document))
    recipe = read(path)
    Chain(recipe, folder, launch(recipe.compute), lambda task, done: None).student()


def make_teacher(teacher: str, seed: int, data: Path, out: Path) -> Path:
    """A run whose student learns nothing to speak of, for its teacher."""
    folder = teacher_run(out, teacher, seed)
    document = copy.deepcopy({**BASE, "seed": seed, "terms": {"kd": {}}})
    document["data"]["path"] = str(data)
    document["schedule"] = {**SCHEDULE, "epochs": 1, "warmup": 0}
    document["teacher"] = {"name": "small/24,48,96,96", "method": teacher, "schedule": SCHEDULE}
    train(document, folder)
    return folder


def row(name: str, teacher: str | None, seed: int, folder: Path, stage: str = "student") -> dict[str, Any]:
    document, _ = evaluate_run(folder, stage, None, None)
    figures = {key: value for key, value in document["figures"].items() if not key.startswith("iou_")}
    return {"method": name, "teacher": teacher, "seed": seed, "epoch": document["epoch"], **figures}


def main(data: Path, out: Path) -> None:
    for noisy in ("lightning.fabric", "lightning_fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.simplefilter("ignore", ErrorSetWarning)
    started, found = time.perf_counter(), out / "rows.json"
    rows: list[dict[str, Any]] = files.read_json(found) or []
    done = {(r["method"], r["teacher"], r["seed"]) for r in rows}
    for seed in SEEDS:
        for teacher in TEACHERS:
            if ("teacher", teacher, seed) not in done:
                folder = make_teacher(teacher, seed, data, out)
                rows.append(row("teacher", teacher, seed, folder, "teacher"))
                files.write_json(found, rows)
        for name, teacher, its_seed, method in jobs():
            if its_seed != seed or (name, teacher, seed) in done:
                continue
            folder = out / f"{len(rows):03d}-{seed}"
            train(recipe_of(method, teacher, seed, data, out), folder)
            rows.append(row(name, teacher, seed, folder))
            files.write_json(found, rows)
            print(f"{time.perf_counter() - started:6.0f} s {name}, {teacher}, {seed}", flush=True)
    settings = {"base": BASE, "methods": METHODS, "variants": VARIANTS, "teachers": TEACHERS, "seeds": SEEDS}
    environment = {**doctor.environment(), "threads": torch.get_num_threads()}
    files.write_json(RESULT, {"rows": rows, "settings": json.loads(json.dumps(settings)), "environment": environment})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
