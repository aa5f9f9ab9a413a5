"""DeTT against KD from a class-token ViT, whose head reads no map: docs/results/token_teacher.json.

    python experiments/token_teacher.py SRC OUT [SEED ...]

SRC holds mnist/ (IDX files) and cifar10/, OUT gets data, runs and rows. Digits are drawn on photographs that agree
with the class for nine training images in ten. The teacher is trained by group DRO; both students are the same small
CNN. The epoch is chosen on validation images, test images are looked at once, at the end. Interrupted and started
again it goes on.
"""

from __future__ import annotations

import copy
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from debiaskd.cli import doctor  # noqa: E402
from debiaskd.data import prepare  # noqa: E402
from debiaskd.evaluation.evaluate import evaluate_run  # noqa: E402
from debiaskd.pipeline.stages import Pipeline  # noqa: E402
from debiaskd.recipe import read  # noqa: E402
from debiaskd.reweight import ErrorSetWarning  # noqa: E402
from debiaskd.training.fabric import launch  # noqa: E402
from debiaskd.utils import files  # noqa: E402

SEEDS = (0, 1, 2)
IMAGES: dict[str, Any] = {"size": 32, "seed": 0, "agreement": 0.9, "train": 5000, "val": 600, "test": 2000}
SCHEDULE: dict[str, Any] = {
    "epochs": 8,
    "batch": 64,
    "optimizer": "adamw",
    "learning_rate": 3e-3,
    "shape": "cosine",
    "warmup": 1,
}
TEACHER: dict[str, Any] = {
    "name": "vit_digits",
    "method": "group_dro",
    "schedule": {**SCHEDULE, "epochs": 10, "learning_rate": 1e-3, "weight_decay": 0.05},
    "cache": "fp32",
}
RECIPE: dict[str, Any] = {
    "data": {"flip": False},
    "teacher": TEACHER,
    "student": {"name": "small/16/1,32,64,64/1"},
    "schedule": SCHEDULE,
    "selection": {"rule": "worst_group", "every": 2},
    "compute": {"accelerator": "cpu"},
}
METHODS: dict[str, dict[str, Any]] = {
    "kd": {"terms": {"kd": {}}},
    "dett": {
        "terms": {"match": {}},
        "transplant": {"projector": "depthwise"},
        "weights": {"method": "errors", "up": 50, "epochs": 1},
    },
}


@register_model
def vit_digits(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """A ViT of 0.2 M parameters on patches of 4×4 pixels, whose head reads the class token."""
    options = {name: options[name] for name in ("num_classes",) if name in options}
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4, **options)


def rows_of(seed: int, data: Path, out: Path) -> list[dict[str, Any]]:
    """Of one seed; what is there already is not done again."""
    path = out / f"rows-{seed}.json"
    rows: list[dict[str, Any]] = files.read_json(path) or []
    teacher: Path | None = None
    for method, added in METHODS.items():
        run = out / f"{seed}-{method}"
        recipe = copy.deepcopy({**RECIPE, **added})
        if teacher is not None:  # the one that the first run trained
            given = {"name": TEACHER["name"], "weights": str(teacher), "cache": TEACHER["cache"]}
            recipe["teacher"] = given
        else:
            teacher = run / "teacher" / "model.safetensors"
        if any(row["method"] == method for row in rows):
            continue
        started = time.perf_counter()
        text = yaml.safe_dump({**recipe, "seed": seed, "data": {**recipe["data"], "path": str(data)}})
        run.with_suffix(".yaml").write_text(text)
        found = read(run.with_suffix(".yaml"))
        Pipeline(found, run, launch(found.compute), lambda *news: None).student()
        stages = ["teacher", "student"] if method == "kd" else ["student"]
        for stage in stages:
            document, _ = evaluate_run(run, stage, None, None)
            figures = {key: document["figures"][key] for key in ("accuracy", "worst_group_accuracy")}
            rows.append({"method": method if stage == "student" else stage, "seed": seed, **figures})
        files.write_json(path, rows)
        print(f"{time.perf_counter() - started:6.0f} s {rows[-len(stages) :]}", flush=True)
    return rows


def main(source: Path, out: Path, seeds: tuple[int, ...]) -> None:
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", ErrorSetWarning)
    prepare("mnist_on_cifar", source, out / "data", **IMAGES)
    for seed in seeds:
        rows_of(seed, out / "data", out)
    everything = [files.read_json(out / f"rows-{seed}.json") or [] for seed in SEEDS]
    if len({len(rows) for rows in everything}) > 1 or not everything[0]:
        return
    environment = {**doctor.environment(), "threads": torch.get_num_threads()}
    settings = {"images": IMAGES, "recipe": RECIPE, "methods": METHODS}
    files.write_json(
        ROOT / "docs" / "results" / "token_teacher.json",
        {"rows": [row for rows in everything for row in rows], "settings": settings, "environment": environment},
    )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), tuple(map(int, sys.argv[3:])) or SEEDS)
