"""DeTT against KD from a class-token ViT, whose head reads no map: docs/results/token_teacher.json.

    python experiments/token_teacher.py OUT [SEED ...]

The quickstart's images, student and schedules (`recipes/quickstart/kd.yaml`, `dett.yaml`); only the teacher is another
network: a ViT of 0.2 M parameters on 6×6 patches, with convolutions before its patches, since a ViT that cuts the
pixels themselves does not learn from 5,000 images. It is trained as the quickstart's, all four groups drawn equally
often, for twice as many epochs. The epoch is chosen on validation images; test images are looked at once, at the end.
OUT gets data, runs and stages. An interrupted command continues where it stopped when it is run again.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import debiaskd as dk  # noqa: E402
from debiaskd.cli import doctor  # noqa: E402
from debiaskd.cli.quickstart import PICTURES  # noqa: E402
from debiaskd.data import prepare  # noqa: E402
from debiaskd.evaluation.evaluate import evaluate_run  # noqa: E402
from debiaskd.pipeline.stages import Pipeline  # noqa: E402
from debiaskd.recipe import read  # noqa: E402
from debiaskd.reweight import ErrorSetWarning  # noqa: E402
from debiaskd.training.fabric import launch  # noqa: E402
from debiaskd.utils import files  # noqa: E402

SEEDS = (0, 1, 2)
TEACHER = (
    *("--teacher.name", "vit_digits"),
    *("--teacher.schedule.epochs", "12"),
    *("--teacher.schedule.learning_rate", "1e-3"),
)
METHODS = ("kd", "simkd", "dett")
MEASURED = ("accuracy", "worst_group_accuracy", "unbiased_accuracy")
WIDTHS = (16, 32, 64)


class Stem(nn.Module):
    """[N,3,H,W] to [N,64,H/8,W/8]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for width in WIDTHS:
            steps += [nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.steps = nn.Sequential(*steps)

    def forward(self, images: Tensor) -> Tensor:
        return self.steps(images)  # type: ignore[no-any-return]


def _embed(img_size: int, in_chans: int, embed_dim: int, **options: Any) -> nn.Module:
    options = {name: value for name, value in options.items() if name not in ("patch_size", "bias")}
    return HybridEmbed(Stem(in_chans), img_size, 1, in_chans=in_chans, embed_dim=embed_dim, **options)


@dk.register_model("vit_digits")
def vit_digits(num_classes: int, **options: Any) -> nn.Module:
    """A ViT of 48×48 pixels whose head reads the class token."""
    network = partial(VisionTransformer, img_size=48, patch_size=8, embed_dim=64, depth=3, num_heads=4)
    return network(num_classes=num_classes, embed_layer=_embed, **options)


def rows_of(seed: int, out: Path) -> list[dict[str, Any]]:
    """Of one seed; finished runs are not trained again."""
    data = out / "data" / f"digits-{seed}"
    prepare("digits", None, data, seed=seed, **PICTURES)
    here = ("--data.path", str(data), "--seed", str(seed), "--compute.stages", str(out / "stages"), *TEACHER)
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        started, run = time.perf_counter(), out / f"{method}-{seed}"
        recipe = read(f"quickstart/{method}", here)
        Pipeline(recipe, run, launch(recipe.compute), lambda *news: None).student()
        for stage in ("student",) if rows else ("teacher", "student"):
            document, _ = evaluate_run(run, stage, None, None)
            measured = {key: document["figures"][key] for key in MEASURED}
            rows.append({"method": method if stage == "student" else stage, "seed": seed, **measured})
            print(f"{time.perf_counter() - started:6.0f} s {rows[-1]}", flush=True)
    return rows


def main(out: Path, seeds: tuple[int, ...]) -> None:
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", ErrorSetWarning)
    rows = [row for seed in seeds for row in rows_of(seed, out)]
    environment = {**doctor.environment(), "threads": torch.get_num_threads()}
    settings = {"images": dict(PICTURES), "teacher": list(TEACHER), "methods": list(METHODS)}
    files.write_json(
        ROOT / "docs" / "results" / "token_teacher.json",
        {"rows": rows, "seeds": list(seeds), "settings": settings, "environment": environment},
    )


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), tuple(map(int, sys.argv[2:])) or SEEDS)
