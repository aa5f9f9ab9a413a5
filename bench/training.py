"""What a training step costs with everything on, against the bare step of the same models.

    python -m debiaskd.bench.training [--device cpu] [--batch 32] [--size 224] [--turns 7] [--out bench/results]

bare        teacher forward; student forward and backward with cross-entropy; optimiser
terms       the same with matched maps, guidance at the final layer, and CID's four terms
cached      the same with the teacher's answers read from the disk instead of computed

Teacher ResNet-50, student ResNet-18 with the teacher's last layer. Turns alternate, ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from debiaskd.bench import environment
from torch.nn import functional as F

from debiaskd import Boxes
from debiaskd.data import Batch
from debiaskd.models.frozen_teacher import FrozenTeacher
from debiaskd.models.transplant import transplant
from debiaskd.recipe import Schedule
from debiaskd.terms import (
    TERMS,
    BackdoorOptions,
    Draws,
    GuideOptions,
    GuideTerm,
    KdOptions,
    MatchOptions,
    Ranks,
    RelationOptions,
    SampleOptions,
    Setting,
    make_guide,
)
from debiaskd.training.feature_extraction import FeatureExtractor, find_feature_layers
from debiaskd.training.learner import Learner, Step
from debiaskd.training.schedule import optimizer
from debiaskd.training.teacher_cache import CachedTeacher, write_cache
from debiaskd.training.teacher_outputs import LiveTeacher, TeacherOutputs

CLASSES = 20
EPOCH = 1  # the intervention has begun


class _Stored:
    """Images as `write_cache` wants them: already in the form that the network reads."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.split, self.whole, self.dataloader = batch, self, self, self
        self.numbers, self.batch_size = torch.arange(len(batch)), len(batch)
        self.device = batch.images.device

    def __getitems__(self, numbers: Any) -> Batch:
        return self.batch

    def transform(self, batch: Batch, draws: Any = None) -> Batch:
        return batch


def measure(device: str, batch_size: int, size: int, turns: int) -> dict[str, Any]:
    import timm

    torch.manual_seed(0)
    batch = _batch(batch_size, size).to(device)
    still = FrozenTeacher(timm.create_model("resnet50", num_classes=CLASSES).eval()).to(device)
    still.to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        live = LiveTeacher(still)
        for _ in write_cache(
            Path(folder),
            live,
            _Stored(batch),  # type: ignore[arg-type]
            seed=0,
            views=1,
            dtype="fp32",
            parts=("feature", "pooled", "logits"),
        ):
            pass
        cached = CachedTeacher(Path(folder), torch.arange(batch_size), 1, live.width).to(torch.device(device))
        steps = {
            "bare": _bare(still, batch),
            "terms": _terms(still, live, batch),
            "cached": _terms(still, cached, batch),
        }
        return {**_timed(steps, device, turns), "profile": _profile(steps["terms"], device)}


def _profile(step: Callable[[], None], device: str) -> list[dict[str, Any]]:
    """Where a step's time goes: each operator's own share of it, the largest first."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=kinds) as found:
        step()
        _wait(device)
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    spent = {event.key: float(getattr(event, attribute)) for event in found.key_averages()}
    total = sum(spent.values())
    largest = sorted(spent, key=lambda name: -spent[name])[:12]
    return [{"operator": name, "share": spent[name] / total} for name in largest]


def _batch(count: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    target = torch.randint(CLASSES, (count,), generator=generator)
    box = [size // 4, size // 4, size // 2, size // 2]
    return Batch(images, target, Boxes.from_lists([[box]] * count), index=torch.arange(count))


def _student(teacher: FrozenTeacher) -> torch.nn.Module:
    import timm

    student = transplant(teacher, timm.create_model("resnet18", num_classes=CLASSES))
    return student.to(memory_format=torch.channels_last).train()


def _bare(teacher: FrozenTeacher, batch: Batch) -> Callable[[], None]:
    student = _student(teacher)
    trained = torch.optim.SGD(student.parameters(), 1e-3, momentum=0.9, nesterov=True)

    def step() -> None:
        teacher(batch.images)
        F.cross_entropy(student(batch.images), batch.target).backward()
        trained.step()
        trained.zero_grad()

    return step


def _terms(teacher: FrozenTeacher, teaching: TeacherOutputs, batch: Batch) -> Callable[[], None]:
    student = _student(teacher)
    at = find_feature_layers(student, batch.images)
    setting = Setting(CLASSES, False, 0, at.pooled_width, teaching.width)
    guided = GuideOptions(weight=0.1)
    guide = make_guide(guided, student)
    terms: dict[str, Any] = {
        "match": MatchOptions(),
        "kd": KdOptions(),
        "sample": SampleOptions(),
        "relation": RelationOptions(),
        "backdoor": BackdoorOptions(start=EPOCH),
    }
    made = {name: TERMS[name](options, setting) for name, options in terms.items()}
    made["guide"] = GuideTerm(guided, guide)
    weight = torch.ones(len(batch), device=batch.images.device)
    extractor = FeatureExtractor(student, at, ("feature", "pooled"))
    learner = Learner(extractor, made, teacher=teaching, guide=guide, weight=weight).to(batch.images.device)
    trained = optimizer(Schedule(optimizer="sgd", learning_rate=1e-3), learner)
    ranks = Ranks()

    def step() -> None:
        draws = Draws(0, 0, ranks, batch.images.device)
        total, _ = learner(Step(batch, EPOCH, draws, ranks))
        total.backward()
        trained.step()
        trained.zero_grad()

    return step


def _timed(steps: dict[str, Callable[[], None]], device: str, turns: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 2):
        for name, step in steps.items():
            _wait(device)
            began = time.perf_counter()
            step()
            _wait(device)
            if turn > 1:  # the first turns compile, allocate, and decide on the closed form
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    quantiles = {name: [values[0], values[-1]] for name, values in ((n, sorted(v)) for n, v in times.items())}
    ratios = {name: medians[name] / medians["bare"] for name in steps}
    found: dict[str, Any] = {"ratios": ratios, "turns": turns}
    found["spread"] = {name: [q / medians["bare"] for q in quantiles[name]] for name in steps}
    if device != "cpu":
        found["milliseconds"] = {name: 1e3 * value for name, value in medians.items()}
    return found


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="debiaskd.bench.training", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    kept = environment.keep_freed_memory() if options.device == "cpu" else False
    found = measure(options.device, options.batch, options.size, options.turns)
    for name, ratio in found["ratios"].items():
        least, most = found["spread"][name]
        print(f"{name:8} {ratio:6.3f} times the bare step ({least:.3f} to {most:.3f})")
    if options.out is not None:
        document = {
            "batch": options.batch,
            "size": options.size,
            "device": options.device,
            **found,
            "environment": environment.describe(options.device, memory_kept=kept),
        }
        date = document["environment"]["date"]
        path = options.out / f"training-{options.device}-{date}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
