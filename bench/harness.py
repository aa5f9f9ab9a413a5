"""What every benchmark shares: check each provider, then time all of them side by side.

A case is one op on one input. Its providers are different implementations of that op (`eager`, `compile`, `cpp`, …)
and, op by op, references such as a loop over images; two plain copies of the same map, `clone` (into fresh memory, as
a gradient is) and `copy` (into memory that is there already), tell what memory alone would take.

Nothing is timed before its loss and its gradient agree with a float64 reference. Providers then take turns, in a
random order each round, so that a machine that slows down slows all of them; what is reported are medians, and ratios
of medians of one run.
"""

from __future__ import annotations

import functools
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from debiaskd.ops import backend

from .environment import CpuUse

Loss = Callable[[Tensor], Tensor]
Call = Callable[[], None]

COPIES = ("clone", "copy")
NATIVE = ("cpp", "cuda", "triton")
#: Largest relative error (L2 norm) of loss and gradient that still counts as right.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 5e-3}
#: A sample shorter than this is repeated until it is not: the clock itself costs a fraction of a microsecond.
SHORTEST_SAMPLE = 1e-4


class WrongProviderError(AssertionError):
    """A provider whose result differs from the reference. It is not timed."""


@dataclass
class Case:
    """One op on one input.

    `leaf` is what the gradient is for; `eager` is the oracle of it, `public` the package's own
    function, which runs on whatever backend is chosen around it. `references` are further providers.
    """

    op: str
    name: str
    leaf: Tensor
    eager: Loss
    public: Loss
    reference: Loss  # of the leaf in float64
    forward_bytes: int  # that must move, at the least
    backward_bytes: int
    references: dict[str, Loss] = field(default_factory=dict)
    upstream: float = 1.0  # the factor between this loss and what backward starts from
    compiled: bool = True

    def providers(self, device: str) -> tuple[dict[str, Loss], dict[str, str]]:
        """Those that run on the device, and why the others do not."""
        running = {"eager": self.eager}
        missing = {}
        if self.compiled:
            running["compile"] = torch.compile(self.eager, fullgraph=True, dynamic=False)
        for name in NATIVE:
            reason = backend.why_not(self.op, name, device)
            if reason is None:
                running[name] = _under(name, self.public)
            else:
                missing[name] = reason
        return running | self.references, missing


def _under(name: str, public: Loss) -> Loss:
    def loss(leaf: Tensor) -> Tensor:
        with backend.backend(name):
            return public(leaf)

    return loss


@dataclass
class Settings:
    device: str = "cpu"
    seconds: float = 6.0  # spent on timing each case
    fewest_rounds: int = 7
    most_rounds: int = 200
    only: tuple[str, ...] = ()  # providers; all of them where empty
    warming: int = 0  # untimed calls before each turn's timed ones, for what the last provider left behind to settle
    timed: int = 1  # calls timed in each turn


def run(case: Case, settings: Settings) -> dict[str, Any]:
    """Checks and times all providers of a case. The result is what a results file holds of it."""
    torch.compiler.reset()
    providers, missing = case.providers(settings.device)
    if settings.only:
        providers = {name: loss for name, loss in providers.items() if name in settings.only}
    errors = verify(case, providers)
    steps, forwards = _calls(case, providers)
    use = CpuUse()
    step_times = interleave(steps, settings)
    forward_times = interleave(forwards, settings, share=0.3)
    result: dict[str, Any] = {
        "op": case.op,
        "case": case.name,
        "shape": list(case.leaf.shape),
        "dtype": str(case.leaf.dtype).removeprefix("torch."),
        "map_bytes": case.leaf.numel() * case.leaf.element_size(),
        "forward_bytes": case.forward_bytes,
        "backward_bytes": case.backward_bytes,
        "rounds": len(next(iter(step_times.values()))),
        "cpu_share_of_others": use.share_of_others(),
        "missing": missing,
        "providers": {},
    }
    for name, call in steps.items():
        result["providers"][name] = {
            "step": summary(step_times[name]),
            "forward": summary(forward_times[name]) if name in forward_times else None,
            "peak_bytes": peak_memory(call, settings.device),
            "error": errors.get(name),
        }
    return result


# ---- correctness ----------------------------------------------------------------------------------------------------


def verify(case: Case, providers: dict[str, Loss]) -> dict[str, dict[str, float]]:
    """Relative errors of loss and gradient, provider by provider.

    Raises:
        WrongProviderError: for the first one beyond the tolerance of its dtype.
    """
    wide = case.leaf.detach().double().requires_grad_()
    expected_loss = case.reference(wide) * case.upstream
    (expected,) = torch.autograd.grad(expected_loss, wide)
    errors = {}
    for name, loss_of in providers.items():
        loss, gradient = _loss_and_gradient(case, loss_of)
        if gradient.shape != case.leaf.shape or gradient.dtype != case.leaf.dtype:
            raise WrongProviderError(
                f"{case.op}, {case.name}: {name} gave a gradient {gradient.dtype} {gradient.shape}"
            )
        error = {"loss": _distance(loss, expected_loss), "gradient": _distance(gradient, expected)}
        worst = max(error, key=lambda k: error[k])
        tolerance = TOLERANCE[case.leaf.dtype]
        if not all(e <= tolerance for e in error.values()):  # NaN fails too
            raise WrongProviderError(
                f"{case.op}, {case.name}: the {worst} of {name} is off by {error[worst]:.2g}, relative to float64; "
                f"more than {tolerance:g} is wrong, and what is wrong is not timed"
            )
        errors[name] = error
    return errors


def _loss_and_gradient(case: Case, loss_of: Loss) -> tuple[Tensor, Tensor]:
    loss = loss_of(case.leaf)
    if case.upstream != 1:
        loss = loss * case.upstream
    (gradient,) = torch.autograd.grad(loss, case.leaf)
    return loss, gradient


def _distance(value: Tensor, expected: Tensor) -> float:
    scale = expected.norm().item()
    return (value.detach().double() - expected).norm().item() / (scale if scale > 0 else 1.0)


# ---- timing ---------------------------------------------------------------------------------------------------------


def _calls(case: Case, providers: dict[str, Loss]) -> tuple[dict[str, Call], dict[str, Call]]:
    """What is timed: forward and backward; forward alone, as in evaluation. All that a call allocates it also frees."""
    steps: dict[str, Call] = {name: _step(case, loss) for name, loss in providers.items()}
    forwards: dict[str, Call] = {name: _forward(case, loss) for name, loss in providers.items()}
    source = case.leaf.detach()
    target = torch.empty_like(source)
    steps["clone"] = lambda: _discard(source.clone())
    steps["copy"] = lambda: _discard(target.copy_(source))
    return steps, forwards


def _step(case: Case, loss: Loss) -> Call:
    return lambda: _discard(_loss_and_gradient(case, loss))


def _forward(case: Case, loss: Loss) -> Call:
    def call() -> None:
        with torch.no_grad():
            loss(case.leaf)

    return call


def _discard(_: object) -> None:
    return None


def interleave(calls: dict[str, Call], settings: Settings, share: float = 1.0) -> dict[str, list[float]]:
    """Seconds of each call, round by round, until the time is spent."""
    clock = _cuda_seconds if settings.device == "cuda" else _cpu_seconds
    repeats = {}
    for name, call in calls.items():  # the first call pays for compiling and first touches, the second tells how long
        clock(call, 1)
        repeats[name] = max(1, round(SHORTEST_SAMPLE / max(clock(call, 1), 1e-7)))
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
                clock(calls[name], repeats[name])
            times[name].extend(clock(calls[name], repeats[name]) for _ in range(settings.timed))
    return times


def _cpu_seconds(call: Call, repeats: int) -> float:
    begin = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - begin) * 1e-9 / repeats


def _cuda_seconds(call: Call, repeats: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _flush_caches()
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / repeats


@functools.cache
def _larger_than_caches() -> Tensor:
    return torch.empty(1 << 28, dtype=torch.uint8, device="cuda")


def _flush_caches() -> None:
    """Inputs that the last call left in the GPU's second-level cache would be read faster than a step ever reads."""
    _larger_than_caches().zero_()


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and the range that holds the middle 80 %."""
    low, median, high = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.1, 0.5, 0.9]).double())
    return {"median": median.item(), "p10": low.item(), "p90": high.item()}


# ---- memory ---------------------------------------------------------------------------------------------------------


def peak_memory(call: Call, device: str) -> int:
    """Bytes that a call holds at its peak beyond what it was given, as PyTorch's allocator sees it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with _profiled() as recorded:
        call()
    level = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


@contextmanager
def _profiled() -> Iterator[Any]:
    """The profiler's own messages go to the process's stderr, past Python: they are kept out of the table."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            yield recorded
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
