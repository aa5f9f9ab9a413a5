"""`python -m debiaskd.bench.metrics`: metrics of attribution maps, against one map after the other.

The loop is how the public code of Rao et al. 2023 goes about it: for each map a mask painted from its boxes, the
mask's size for the box-size bins, pixels gathered by index lists, and one number appended to a list. Both are given
the same maps, and nothing is timed before all of their numbers agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.metrics import energy_in_box

from . import box_overlap, environment
from .harness import WrongProviderError
from .localization import corner_lists, random_boxes
from .timing import Settings, interleave, summary

Corners = list[list[list[int]]]
Metric = Callable[[], Tensor]
#: Times as fast as the loop, at least.
GOALS = {"EPG 5000×224×224, 3 boxes": 50.0, **box_overlap.GOALS}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m debiaskd.bench.metrics", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="of timing for each case (default 5)")
    parser.add_argument("--out", type=Path, help="where the JSON goes; nothing is written without it")
    parser.add_argument("--quick", action="store_true", help="tiny inputs: whether it runs, not how fast")
    options = parser.parse_args(arguments)
    if options.threads < 1 or options.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    kept = environment.keep_freed_memory()
    torch.set_num_threads(options.threads)
    settings = Settings(seconds=0.0, fewest_rounds=options.rounds, most_rounds=options.rounds)
    try:
        metrics = measure(settings, options.quick)
    except WrongProviderError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(table(metrics))
    if options.out is not None:
        where = environment.describe("cpu", kept)
        results = {"schema": 1, "environment": where, "metrics": metrics}
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"metrics-{where['date']}.json"
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        print(path)
    return 0


def measure(settings: Settings, quick: bool) -> list[dict[str, Any]]:
    count, side = (6, 16) if quick else (5000, 224)
    found: list[dict[str, Any]] = []
    for map_side in (side, 2 if quick else 7):
        size = None if map_side == side else (side, side)
        maps = torch.randn(count, map_side, map_side, generator=torch.Generator().manual_seed(0))
        boxes = random_boxes(count, 3, (side, side))
        corners = corner_lists(boxes)
        shape = f"{count}×{map_side}×{map_side}" + (f" to {side}×{side}" if size else "") + ", 3 boxes"

        loop = partial(one_by_one, maps=maps, corners=corners, size=size)
        cases = [(f"EPG {shape}", partial(energy_in_box, maps, boxes, size), energy_of_one)]
        cases.extend(box_overlap.cases(maps, boxes, size, shape))
        for name, ours, each in cases:
            read = maps.sum if size is None else None
            found.append(case(name, ours, None if each is None else partial(loop, each), read, settings))
    return found


def case(name: str, ours: Metric, theirs: Metric | None, read: Metric | None, settings: Settings) -> dict[str, Any]:
    """`theirs` and `read` are timed beside `ours` where they are given."""
    found: dict[str, Any] = {"case": name}
    calls = {"batched": ours, "loop": theirs, "read": read}
    if theirs is not None:
        found["largest_difference"] = worst = float((ours().double() - theirs().double()).abs().max())
        if not worst <= 1e-5:  # NaN fails too
            raise WrongProviderError(f"{name}: off by {worst:.2g}; more than 1e-05 is wrong, and is not timed")
    use = environment.CpuUse()
    times, _ = interleave({who: partial(_discard, call) for who, call in calls.items() if call is not None}, settings)
    medians = {who: statistics.median(seconds) for who, seconds in times.items()}
    found["seconds"] = {who: summary(seconds) for who, seconds in times.items()}
    if theirs is not None:
        found |= {"ratio": medians["loop"] / medians["batched"], "goal": GOALS.get(name)}
    if read is not None:
        found["over_read"] = medians["batched"] / medians["read"]
    found["cpu_share_of_others"] = use.share_of_others()
    return found


def table(metrics: Sequence[dict[str, Any]]) -> str:
    """As Markdown, for the terminal and the page."""
    lines = [
        "| metric | × faster than one by one | at least | time / reading the maps |",
        "| --- | ---: | ---: | ---: |",
    ]
    for found in metrics:
        ratio, goal, over_read = (found.get(name) for name in ("ratio", "goal", "over_read"))
        numbers = (
            f"{ratio:.0f}" if ratio else "",
            f"{goal:.0f}" if goal else "",
            f"{over_read:.2f}" if over_read else "",
        )
        lines.append(f"| {found['case']} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _discard(call: Metric) -> None:
    call()


# ---- one map after the other ----------------------------------------------------------------------------------------


def one_by_one(
    each: Callable[..., Tensor],
    maps: Tensor,
    corners: Corners,
    size: tuple[int, int] | None,
    options: tuple[float, ...] = (),
) -> Tensor:
    found = []
    for one, image_boxes in zip(maps, corners):
        if size is not None:
            one = F.interpolate(one[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        positive = one.clamp(min=0)
        mask = torch.zeros_like(positive, dtype=torch.long)
        for x0, y0, x1, y1 in image_boxes:
            mask[y0:y1, x0:x1] = 1
        found.append(each(positive, mask, box_overlap.pixels(mask == 1), *options))
    return torch.stack(found)


def energy_of_one(positive: Tensor, mask: Tensor, box_pixels: int) -> Tensor:
    if box_pixels == 0:
        return torch.tensor(0.0)
    inside, total = positive[torch.where(mask == 1)].sum(), positive.sum()
    return torch.tensor(0.0) if total < 1e-7 else inside / total


if __name__ == "__main__":
    sys.exit(main())
