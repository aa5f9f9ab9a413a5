"""Compiles the Triton kernels for GPUs that are not here, by ordinary calls on tensors without memory.

    env -u TRITON_INTERPRET python tests/triton_compile.py feature_match cuda:90

prints as JSON, for each case of the op, what became of its launches. A process of its own, because Triton reads when it
is imported whether it interprets, which the other tests have it do. Whoever adds an op adds its cases to CASES.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


@dataclass(frozen=True)
class Case:
    """A call of an op's kernel module, given to it as `call(module)`.

    launches: the kernels that it starts, in their order.
    wide: kernel -> how many loads and how many stores of 16 bytes each thread makes, at least. A tile of 4096 float32
        is 4 of them for each of 256 threads. Kernels not named here move what they can.
    long: has sizes beyond 32 bits, so that no product may have 32.
    """

    call: Callable[[Any], object]
    launches: tuple[str, ...]
    wide: dict[str, tuple[int, int]] = field(default_factory=dict)
    long: bool = False


def some(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _match(
    make: Callable[[], torch.Tensor], weighted: bool, normalize: bool = False, reduction: int = 1
) -> Callable[[Any], object]:
    def call(module: Any) -> object:
        student, teacher = make(), make()
        weight = some(len(student)) if weighted else None
        return module.feature_match(student, teacher, weight, normalize, reduction, True)

    return call


def _match_backward(make: Callable[[], torch.Tensor], normalize: bool = False) -> Callable[[Any], object]:
    return lambda module: module.feature_match_backward(some(), make(), make(), some(len(make())), normalize, 1)


def _maps(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return some(64, 2048, 7, 7, dtype=dtype)


def _half_maps() -> torch.Tensor:
    return _maps(torch.bfloat16)


CASES: dict[str, dict[str, Case]] = {
    "feature_match": {
        "maps": Case(_match(_maps, True), ("_match", "_add_up"), {"_match": (8, 4)}),
        "maps that count alike": Case(_match(_maps, False), ("_match", "_add_up"), {"_match": (8, 4)}),
        "bfloat16 maps": Case(_match(_half_maps, True), ("_match", "_add_up"), {"_match": (4, 2)}),
        "channels_last": Case(
            _match(lambda: _maps().to(memory_format=torch.channels_last), True),
            ("_match", "_add_up"),
            {"_match": (8, 4)},
        ),
        "cropped": Case(
            _match(lambda: some(64, 40, 32, 48)[:, :, :16, 4:36], True), ("_match", "_add_up"), {"_match": (8, 4)}
        ),
        "permuted, odd": Case(
            _match(lambda: some(64, 5, 37, 33)[:, :, ::2].transpose(1, 3), True), ("_match", "_add_up")
        ),
        "short samples": Case(_match(lambda: some(5000, 49), True), ("_add_up", "_match", "_add_up")),
        "rows of 1000": Case(
            _match(lambda: some(64, 1000, dtype=torch.float16), True, normalize=True, reduction=0),
            ("_match",),
            {"_match": (4, 2)},
        ),
        "long, relative": Case(
            _match(_maps, True, normalize=True), ("_norms", "_match", "_add_up"), {"_norms": (4, 0), "_match": (8, 4)}
        ),
        "float64, relative": Case(
            _match(lambda: some(64, 8192, dtype=torch.float64), True, normalize=True),
            ("_match", "_add_up"),
            {"_match": (16, 8)},
        ),
        "4 numbers": Case(_match(lambda: some(1, 4), False), ("_match",)),
        "2^32 elements": Case(
            _match(lambda: some(2**16, 2**16), False), ("_match", "_add_up"), {"_match": (8, 4)}, True
        ),
        "2^31 elements a sample": Case(
            _match(lambda: some(2, 2**31 + 1), True, normalize=True), ("_norms", "_match", "_add_up"), {}, True
        ),
        "backward": Case(_match_backward(_maps), ("_match",), {"_match": (8, 4)}),
        "float16 backward": Case(_match_backward(_half_maps), ("_match",), {"_match": (4, 2)}),
        "scaled": Case(lambda module: module.feature_match_scale_(_maps(), some()), ("_scale",), {"_scale": (4, 4)}),
        "scaled by sample": Case(
            lambda module: module.feature_match_scale_(_half_maps(), some(64)), ("_scale",), {"_scale": (2, 2)}
        ),
    },
}


class _AbsentGPU:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(target: str) -> list[tuple[str, int, Any]]:
    """From here on launches compile and do no more; each appends kernel, programs and what Triton made of it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    backend, arch = target.split(":")
    driver.set_active(_AbsentGPU(GPUTarget(backend, *((int(arch), 32) if backend == "cuda" else (arch, 64)))))
    launch, launches = JITFunction.run, []

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = launch(self, *arguments, grid=grid, warmup=True, **options)
        launches.append((self.fn.__name__, grid[0], compiled.asm))

    JITFunction.run = run
    return launches


def narrow_addresses(ttir: str, long: bool) -> list[str]:
    """Where 32 bits may be too few: offsets of pointers, products of many offsets at once, and all products of `long`.

    Products with 2, 4, 8 and 16 are hints that the number was divisible, and no larger than the number itself.
    """
    found = re.findall(r"tt\.addptr.*, (?:tensor<.*xi32>|i32) .*", ttir)
    found += re.findall(r"arith\.muli.* : tensor<.*xi32>.*", ttir)
    if long:
        products = re.findall(r"arith\.muli.* : i32\b.*", ttir)
        found += [line for line in products if not re.search(r"%c(2|4|8|16)_i32", line)]
    return found


def cuda_facts(asm: Any) -> dict[str, int]:
    import triton

    wide = {"ld": 0, "st": 0}
    for kind, count, bits in re.findall(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)", asm["ptx"]):
        wide[kind] += int(count or 1) * int(bits) // 128
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    spilled = used["STACK"] + used["LOCAL"]
    return {"loads": wide["ld"], "stores": wide["st"], "registers": used["REG"], "spilled": spilled}


def hip_facts(asm: Any) -> dict[str, int]:
    """Loads and stores a thread as if a wavefront had 32 lanes."""
    code = asm["amdgcn"]
    used = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|[vs]gpr_spill_count):\s+(\d+)", code)}
    loads, stores = (2 * len(re.findall(rf"(?:buffer|global)_{kind}_dwordx4", code)) for kind in ("load", "store"))
    spilled = used["vgpr_spill_count"] + used["sgpr_spill_count"]
    return {"loads": loads, "stores": stores, "registers": used["vgpr_count"], "spilled": spilled}


def main(op: str, target: str) -> None:
    module = importlib.import_module(f"debiaskd.kernels.{op}")
    launches = compile_launches(target)
    facts = cuda_facts if target.startswith("cuda") else hip_facts
    report = {}
    for name, case in CASES[op].items():
        launches.clear()
        case.call(module)
        report[name] = [
            {"kernel": kernel, "programs": programs, "narrow": narrow_addresses(asm["ttir"], case.long), **facts(asm)}
            for kernel, programs, asm in launches
        ]
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
