"""`debiaskd bench peers`: whole epochs of distillation, against what people would use instead.

The same networks, images, batch and optimiser: other libraries and loops written out (`bench.peer_loops`) decode a
folder of JPEG files with two workers, debiaskd reads prepared data. Each round runs every provider once, in a random
order; results are medians over rounds, of the first epoch and of the later ones. Every training that ends is added to
the JSON at once. Preparing is timed too, against two workers of torchvision that decode and resize alike.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from debiaskd.data import prepare
from debiaskd.utils.files import write_json

from . import environment
from .data import DIFFERENT, photograph
from .peer_recipes import PROVIDERS
from .peer_session import CLASSES, WORKERS, Session

#: (teacher, student, size, images by default: some seconds an epoch on two cores).
PAIRS = (("resnet18", "resnet10t", 96, 480), ("resnet50", "resnet18", 224, 96))
#: (what of debiaskd, compared with what, its goal in the first epoch, and in later ones).
COMPARED = (
    ("debiaskd", "plain", None, 1.0),
    ("debiaskd kd", "timm kd", 1.2, 1.6),
    ("debiaskd kd", "torchdistill kd", 1.2, 1.6),
    ("debiaskd simkd", "simkd loop", 1.2, 1.6),
    ("debiaskd cid", "cid loop", None, 3.0),
)
PREPARE_GOAL = 1.5


def generate(root: Path, images: int) -> Path:
    """JPEG files in root/train/CLASS and a few in root/val/CLASS, of which at most 100 differ."""
    originals = root / "originals"
    originals.mkdir(parents=True)
    generator = np.random.default_rng(0)
    made = [originals / f"{i:05d}.jpg" for i in range(min(DIFFERENT, images))]
    for path in made:
        photograph(path, generator)
    for split, count in (("train", images), ("val", 2 * CLASSES)):
        for i in range(count):
            path = root / "jpegs" / split / f"class{i % CLASSES}" / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(made[i % len(made)], path)
    return root / "jpegs"


def decoded(folder: Path, size: int) -> int:
    """Images that two workers of torchvision decode and resize, as `debiaskd prepare` does; returns how many."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    resize = transforms.Compose([transforms.Resize((size, size)), transforms.PILToTensor()])
    batches = DataLoader(ImageFolder(str(folder), resize), 64, num_workers=WORKERS)
    return sum(len(labels) for _, labels in batches)


def preparation(jpegs: Path, out: Path, size: int, rounds: int) -> dict[str, Any]:
    """Seconds that preparing takes, and that torchvision takes to decode and resize the same files, by turns."""
    images = sum(1 for _ in (jpegs / "train").rglob("*.jpg"))
    ours, theirs = [], []
    for number in range(rounds):
        target = out / f"prepared{number}"
        started = time.perf_counter()
        prepare("folder", jpegs, target, size=size, workers=WORKERS)
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        if decoded(jpegs / "train", size) != images:
            raise RuntimeError(f"torchvision read another number of images than {images}")
        decoded(jpegs / "val", size)
        theirs.append(time.perf_counter() - started)
    return {"debiaskd": ours, "torchvision": theirs, "prepared": str(out / "prepared0")}


def measure(options: argparse.Namespace, path: Path | None) -> dict[str, Any]:
    use, order = environment.CpuUse(), random.Random(0)
    kept = options.device == "cpu" and environment.keep_freed_memory()
    torch.set_num_threads(options.threads)
    document: dict[str, Any] = {
        "environment": environment.describe(options.device, kept),
        "settings": {"batch": options.batch, "epochs": options.epochs, "rounds": options.rounds, "workers": WORKERS},
        "pairs": [],
    }
    for teacher, student, size, images in chosen(options):
        with tempfile.TemporaryDirectory(prefix="debiaskd-bench-") as temporary:
            root = Path(temporary)
            jpegs = generate(root, images)
            took = preparation(jpegs, root, size, options.rounds)
            prepared, runs = Path(took.pop("prepared")), dict[str, list[list[float]]]()
            pair = {"teacher": teacher, "student": student, "size": size, "images": images}
            document["pairs"].append({**pair, "prepare": took, "runs": runs})
            weights = save_teacher(teacher, root / "teacher.safetensors")
            names = [name for name in PROVIDERS if not options.only or name in options.only]
            for number in range(options.rounds):
                order.shuffle(names)
                for name in names:
                    out = root / "out"
                    out.mkdir()
                    session = Session(
                        **pair,
                        batch=options.batch,
                        epochs=options.epochs,
                        jpegs=jpegs,
                        prepared=prepared,
                        weights=weights,
                        out=out,
                        device=options.device,
                    )
                    seconds = PROVIDERS[name](session)
                    shutil.rmtree(out)
                    runs.setdefault(name, []).append(seconds)
                    rates = ", ".join(f"{images / one:.1f}" for one in seconds)
                    print(
                        f"{teacher} to {student}, {size} px, round {number + 1}: {name:16} {rates} images/s", flush=True
                    )
                    document["environment"]["share_of_others"] = use.share_of_others()
                    if path is not None:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        write_json(path, document)
    return document


def save_teacher(name: str, path: Path) -> Path:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(1)
    save_file(timm.create_model(name, num_classes=CLASSES).state_dict(), path)
    return path


def chosen(options: argparse.Namespace) -> list[tuple[str, str, int, int]]:
    """The pairs, with as many images as fill their batches."""
    found = []
    for place, (teacher, student, size, images) in enumerate(PAIRS):
        if place + 1 in options.pairs:
            images = options.images or images
            found.append((teacher, student, options.size or size, max(images // options.batch, 1) * options.batch))
    return found


def rates(pair: dict[str, Any], name: str) -> tuple[float, float | None]:
    """Images per second of a provider in first epochs, and in later ones (None: there are none): medians."""
    first = [seconds[0] for seconds in pair["runs"][name]]
    later = [one for seconds in pair["runs"][name] for one in seconds[1:]]
    return pair["images"] / statistics.median(first), pair["images"] / statistics.median(later) if later else None


def table(document: dict[str, Any]) -> str:
    """Markdown: images per second as ratios, in the first epoch and in later ones, with what was aimed at."""
    lines = [
        "| networks | epochs | against | first epoch | later epochs | goal |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    for pair in document["pairs"]:
        networks = f"{pair['teacher']} → {pair['student']}, {pair['size']} px"
        for own, other, first_goal, later_goal in COMPARED:
            if own in pair["runs"] and other in pair["runs"]:
                ratios = [
                    "" if mine is None or theirs is None else f"{mine / theirs:.2f}×"
                    for mine, theirs in zip(rates(pair, own), rates(pair, other))
                ]
                goal = f"{later_goal}×" if first_goal is None else f"{first_goal}×, then {later_goal}×"
                lines.append(f"| {networks} | `{own}` | {other} | {ratios[0]} | {ratios[1]} | {goal} |")
        ours, theirs = (statistics.median(pair["prepare"][name]) for name in ("debiaskd", "torchvision"))
        lines.append(
            f"| {networks} | `debiaskd prepare` | two torchvision workers | {theirs / ours:.2f}× | | {PREPARE_GOAL}× |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="debiaskd bench peers", description=__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 2], choices=(1, 2), help="1: ResNet-18 → "
                        "resnet10t at 96 px; 2: ResNet-50 → ResNet-18 at 224 px (default both)")  # fmt: skip
    parser.add_argument("--images", type=int, help="of an epoch; default 480 at 96 px and 96 at 224 px")
    parser.add_argument("--size", type=int, help="side of the images, instead of 96 and 224")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2, help="of each training (default 2)")
    parser.add_argument("--rounds", type=int, default=2, help="trainings of each provider (default 2)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default 2)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", choices=tuple(PROVIDERS), metavar="NAME", help=", ".join(PROVIDERS))
    parser.add_argument("--out", type=Path, help="where peers-DEVICE-DATE.json goes; nothing is written without it")
    options = parser.parse_args(arguments)
    for name in ("images", "size", "batch", "epochs", "rounds", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be an integer >= 1, got {value}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    if "torchdistill kd" in (options.only or PROVIDERS) and importlib.util.find_spec("torchdistill") is None:
        parser.error("torchdistill is not installed: pip install 'debiaskd[bench]', or leave it out with --only")
    path = None
    if options.out is not None:
        path = options.out / f"peers-{options.device}-{time.strftime('%Y-%m-%d')}.json"
    print(f"\n{table(measure(options, path))}")
    if path is not None:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
