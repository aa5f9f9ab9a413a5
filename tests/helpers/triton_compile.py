"""Compiles the Triton kernels for GPUs that are not here, by ordinary calls on tensors without memory.

    env -u TRITON_INTERPRET python tests/helpers/triton_compile.py cuda:90,cuda:80 feature_match

prints as JSON, for each target and each case of the ops named, what became of its launches. A process of its own,
because Triton reads when it is imported whether it interprets, which the other tests have it do. The cases are in
triton_cases; whoever adds an op adds a module there.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TARGETS = ("cuda:90", "cuda:80", "cuda:100", "hip:gfx942")
OPS = tuple(sorted(path.stem for path in Path(__file__).with_name("triton_cases").glob("[a-z]*.py")))


def cases_of(op: str, target: str = TARGETS[0]) -> dict[str, Any]:
    """All cases for the first target; for the others as few as start every kernel."""
    cases: dict[str, Any] = importlib.import_module(f"triton_cases.{op}").CASES
    if target == TARGETS[0]:
        return cases
    seen: set[str] = set()
    return {
        name: case
        for name, case in cases.items()
        if not seen.issuperset(case.launches) and seen.update(case.launches) is None
    }


class _AbsentGPU:
    """As much of a Triton driver as compilation asks for; Triton keeps what it compiled by the number of the device."""

    def __init__(self, target: Any, number: int) -> None:
        self.target, self.number = target, number

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


def aim_at(target: str) -> None:
    """From here on launches are compiled for this target."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    backend, arch = target.split(":")
    made = GPUTarget(backend, *((int(arch), 32) if backend == "cuda" else (arch, 64)))
    driver.set_active(_AbsentGPU(made, TARGETS.index(target) if target in TARGETS else len(TARGETS)))


def compile_launches(target: str) -> list[tuple[str, int, Any]]:
    """From here on launches compile and do no more; each appends kernel, programs and what Triton made of it."""
    from triton.runtime.jit import JITFunction

    aim_at(target)
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
        hints = re.findall(r"(%\w+) = arith\.constant (?:2|4|8|16) : i32", ttir)
        found += [line for line in products if not set(re.findall(r"%\w+", line)) & set(hints)]
    return found


def cuda_facts(asm: Any) -> dict[str, Any]:
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
    tf32 = "tf32" in asm["ptx"]
    return {"loads": wide["ld"], "stores": wide["st"], "registers": used["REG"], "spilled": spilled, "tf32": tf32}


def hip_facts(asm: Any) -> dict[str, Any]:
    """Loads and stores a thread as if a wavefront had 32 lanes."""
    code = asm["amdgcn"]
    # Scratch is memory; lanes of vector registers, where LLVM keeps scalar ones that it calls spilled too, are not.
    wanted = r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)"
    used = {name: int(value) for name, value in re.findall(wanted, code)}
    loads, stores = (2 * len(re.findall(rf"(?:buffer|global)_{kind}_dwordx4", code)) for kind in ("load", "store"))
    spilled = used["vgpr_spill_count"] + used["private_segment_fixed_size"]
    tf32 = "xf32" in code
    return {"loads": loads, "stores": stores, "registers": used["vgpr_count"], "spilled": spilled, "tf32": tf32}


def main(targets: str, *ops: str) -> None:
    launches = compile_launches(targets.split(",")[0])
    report: dict[str, dict[str, dict[str, Any]]] = {}
    for target in targets.split(","):
        aim_at(target)
        facts = cuda_facts if target.startswith("cuda") else hip_facts
        report[target] = {op: {} for op in ops}
        for op in ops:
            module = importlib.import_module(f"debiaskd.kernels.{op}")
            for name, case in cases_of(op, target).items():
                launches.clear()
                case.call(module)
                report[target][op][name] = [
                    {"kernel": kernel, "programs": programs, "narrow": narrow_addresses(asm["ttir"], case.long)}
                    | facts(asm)
                    for kernel, programs, asm in launches
                ]
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
