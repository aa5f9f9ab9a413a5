"""Clocks: providers take turns, and a GPU's times are those of the device.

On a GPU, events recorded around Python code measure Python wherever the kernels are shorter than the code that starts
them. A call is therefore captured in a CUDA graph, and the graph's replay is timed ("graph"). A call that cannot be
captured runs behind a kernel that spins for longer than the host needs to queue it ("queued"). A call that waits for
the device, such as a loop over images that reads a sum, can only be timed as it is ("host"). The second-level cache is
flushed before every repeat.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], None]
#: Seconds of one call of a provider, over a number of repeats.
Clock = Callable[[int], float]

#: A sample shorter than this is repeated until it is not: the clock itself costs a fraction of a microsecond.
SHORTEST_SAMPLE = 1e-4


@dataclass
class Settings:
    """How long, how often and which providers are timed."""

    device: str = "cpu"
    seconds: float = 6.0  # spent on timing each case
    fewest_rounds: int = 7
    most_rounds: int = 200
    only: tuple[str, ...] = ()  # providers; all of them where empty
    warming: int = 0  # untimed calls before each turn's timed ones, for what the last provider left behind to settle
    timed: int = 1  # calls timed in each turn
    keep_going: bool = False  # leave out a provider that fails instead of raising


def interleave(
    calls: dict[str, Call], settings: Settings, share: float = 1.0
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each call, round by round, until the time is spent; and the kind of clock that measured it."""
    clocks: dict[str, Clock] = {}
    kinds: dict[str, str] = {}
    repeats = {}
    for name, call in calls.items():  # the first call pays for compiling and first touches, the second tells how long
        call()
        kinds[name], clocks[name] = cuda_clock(call) if settings.device == "cuda" else ("host", cpu_clock(call))
        repeats[name] = max(1, round(SHORTEST_SAMPLE / max(clocks[name](1), 1e-7)))
        if settings.device == "cuda":
            repeats[name] = min(repeats[name], 10)  # each is flushed for, which takes as long as a short sample
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + settings.seconds * share
    for done in range(settings.most_rounds):
        if done >= settings.fewest_rounds and time.perf_counter() > end:
            break
        shuffle(order)
        for name in order:
            for _ in range(settings.warming):
                clocks[name](repeats[name])
            times[name].extend(clocks[name](repeats[name]) for _ in range(settings.timed))
    return times, kinds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and the range that holds the middle 80 %."""
    low, median, high = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.1, 0.5, 0.9]).double())
    return {"median": median.item(), "p10": low.item(), "p90": high.item()}


# ---- CPU ----


def cpu_clock(call: Call) -> Clock:
    def clock(repeats: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(repeats):
            call()
        return (time.perf_counter_ns() - begin) * 1e-9 / repeats

    return clock


# ---- GPU ----


def cuda_clock(call: Call) -> tuple[str, Clock]:
    """The clock that fits a call, and its kind: "graph", "queued" or "host"."""
    if waits(call):
        return "host", event_clock(call, 0)
    replay = captured(call)
    if replay is not None:
        return "graph", event_clock(replay, 0)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    queueing = time.perf_counter() - begin
    return "queued", event_clock(call, round(3 * queueing * cycles_per_second()))


def waits(call: Call) -> bool:
    """Whether the call synchronises with the device. It has run before."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def captured(call: Call) -> Call | None:
    """Replays the call as a CUDA graph; None where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def event_clock(call: Call, spin: int) -> Clock:
    """Device seconds between events around each repeat, behind a kernel of `spin` cycles where that is not 0."""

    def clock(repeats: int) -> float:
        events = []
        for _ in range(repeats):
            flush_caches()
            if spin:
                torch.cuda._sleep(spin)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return sum(float(begin.elapsed_time(end)) for begin, end in events) * 1e-3 / repeats

    return clock


@functools.cache
def cycles_per_second() -> float:
    """Of the kernel that spins, measured once."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1_000)
    begin.record()
    torch.cuda._sleep(10_000_000)
    end.record()
    end.synchronize()
    return 10_000_000 / (float(begin.elapsed_time(end)) * 1e-3)


@functools.cache
def _larger_than_caches() -> Tensor:
    return torch.empty(1 << 28, dtype=torch.uint8, device="cuda")


def flush_caches() -> None:
    """Inputs that the last call left in the GPU's second-level cache would be read faster than a step ever reads."""
    _larger_than_caches().zero_()
