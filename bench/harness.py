"""What every benchmark shares: check each provider, then time all of them side by side.

A case is one op on one input. Its providers are different implementations of that op (`eager`, `compile`, `cpp`, …)
and, op by op, references such as a loop over images; two plain copies of the same map, `clone` (into fresh memory, as
a gradient is) and `copy` (into memory that is there already), tell what memory alone would take.

Nothing is timed before its loss and its gradient agree with a float64 reference. Providers then take turns, in a
random order each round, so that a machine that slows down slows all of them; what is reported are medians, and ratios
of medians of one run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from debiaskd.ops import backend

from .environment import CpuUse
from .timing import Call, Settings, interleave, summary

Loss = Callable[[Tensor], Tensor]

COPIES = ("clone", "copy")
NATIVE = ("cpp", "cuda", "triton")
#: Largest relative error (L2 norm) of loss and gradient that still counts as right.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 5e-3}


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


def run(case: Case, settings: Settings) -> dict[str, Any]:
    """Checks and times all providers of a case. The result is what a results file holds of it."""
    torch.compiler.reset()
    providers, missing = case.providers(settings.device)
    if settings.only:
        providers = {name: loss for name, loss in providers.items() if name in settings.only}
    failed: dict[str, str] = {}
    if settings.keep_going:
        failed = failures(case, providers)
        missing |= {name: f"failed: {why}" for name, why in failed.items()}
        providers = {name: loss for name, loss in providers.items() if name not in failed}
    errors = verify(case, providers)
    steps, forwards = _calls(case, providers)
    use = CpuUse()
    step_times, clocks = interleave(steps, settings)
    forward_times, _ = interleave(forwards, settings, share=0.3)
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
        "failed": sorted(failed),
        "providers": {},
    }
    for name, call in steps.items():
        result["providers"][name] = {
            "step": summary(step_times[name]),
            "forward": summary(forward_times[name]) if name in forward_times else None,
            "clock": clocks[name],
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


def failures(case: Case, providers: dict[str, Loss]) -> dict[str, str]:
    """The providers that raise or are wrong, each with the first line of why."""
    found = {}
    for name, loss in providers.items():
        try:
            verify(case, {name: loss})
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found


def _loss_and_gradient(case: Case, loss_of: Loss) -> tuple[Tensor, Tensor]:
    loss = loss_of(case.leaf)
    if case.upstream != 1:
        loss = loss * case.upstream
    (gradient,) = torch.autograd.grad(loss, case.leaf)
    return loss, gradient


def _distance(value: Tensor, expected: Tensor) -> float:
    scale = expected.norm().item()
    return (value.detach().double() - expected).norm().item() / (scale if scale > 0 else 1.0)


# ---- what is timed --------------------------------------------------------------------------------------------------


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
