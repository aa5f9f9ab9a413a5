"""Prints what the compilers made of an op's GPU kernels; needs no GPU. `make sass` and `make ptx` call it.

    python tests/helpers/machine_code.py sass|ptx OP [--arch 90] [--kernel REGEX]

A table comes first: each kernel's registers, its spilled bytes, and its 16-byte loads and stores. Then follows the code
of the kernels whose names match --kernel, by default those for float32 with 16-byte accesses. CUDA kernels are compiled
by nvcc where it is found, else read from the installed library; Triton kernels are compiled for the cases in
triton_cases/.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
HELPERS = Path(__file__).parent


class Kernel(NamedTuple):
    """A compiled kernel: where it comes from, its name, registers, spilled bytes, and its text."""

    origin: str
    name: str
    registers: int
    spilled: int
    code: str

    def row(self) -> str:
        wide = [
            len(re.findall(rf"\b{load}\.E\.\S*128|\b{other}\.global\S*\.v(?:4\.[bfsu]32|2\.[bfsu]64)", self.code))
            for load, other in (("LDG", "ld"), ("STG", "st"))
        ]
        return f"{self.registers:9} {self.spilled:7} {wide[0]:8} {wide[1]:8}  {self.origin}: {self.name}"


def tool(name: str) -> str:
    """A tool of a CUDA installation, or the one in Triton's wheel."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which(name, path=str(Path(spec.origin).parent / "backends/nvidia/bin"))
    if found is None:
        raise SystemExit(f"{name} was not found: install Triton, whose wheel contains it, or the CUDA toolkit")
    return found


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage(binary: str) -> dict[str, tuple[int, int]]:
    """Kernel -> registers and bytes of stack and local memory."""
    found, name = {}, ""
    for line in run(tool("cuobjdump"), "-res-usage", binary).splitlines():
        if line.strip().startswith("Function"):
            name = line.split()[-1].rstrip(":")
        elif "REG:" in line:
            used = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            found[name] = (used["REG"], used["STACK"] + used["LOCAL"])
    return found


def demangled(name: str) -> str:
    if shutil.which("c++filt"):
        name = run("c++filt", name).strip()
    return re.sub(r"debiaskd::|\(anonymous namespace\)::|c10::|^void ", "", name).split("(")[0]


def split(kind: str, text: str) -> dict[str, str]:
    """Kernel -> its code, from what cuobjdump or nvcc prints."""
    start = r"^\s*Function : (\S+)" if kind == "sass" else r"^\s*(?:\.visible |\.weak )?\.entry (\w+)"
    places = [*re.finditer(start, text, re.MULTILINE)]
    ends = [*(place.start() for place in places[1:]), len(text)]
    return {place.group(1): text[place.start() : end] for place, end in zip(places, ends)}


def cuda(kind: str, op: str, arch: str) -> Iterator[Kernel]:
    source = ROOT / "csrc/cuda" / f"{op}.cu"
    if not source.exists():
        return
    library = ROOT / "debiaskd/libdebiaskd_cuda.so"
    with tempfile.TemporaryDirectory() as folder:
        if nvcc := shutil.which("nvcc"):
            from torch.utils.cpp_extension import include_paths

            binary = str(Path(folder) / "op.cubin")
            includes = [f"-I{ROOT / 'csrc'}", *(word for path in include_paths() for word in ("-isystem", path))]
            options = [
                "-std=c++17",
                "-O3",
                "-DUSE_CUDA",
                "-DTORCH_TARGET_VERSION=0x020a000000000000",
                f"-arch=sm_{arch}",
            ]
            run(nvcc, "-cubin", *options, *includes, str(source), "-o", binary)
            if kind == "ptx":
                text = run(nvcc, "-ptx", *options, *includes, str(source), "-o", "/dev/stdout")
            else:
                text = run(tool("cuobjdump"), "-sass", binary)
        elif library.exists():
            binary = str(library)
            text = run(tool("cuobjdump"), f"-{kind}", *(["-arch", f"sm_{arch}"] if kind == "sass" else []), binary)
        else:
            print(f"{source.name}: neither nvcc nor an installed CUDA library", file=sys.stderr)
            return
        used = usage(binary)
        for name, code in split(kind, text).items():
            if f"{op}_cu_" in name:
                yield Kernel(f"csrc/cuda/{op}.cu", demangled(name), *used.get(name, (0, 0)), code)


def triton(kind: str, op: str, arch: str) -> Iterator[Kernel]:
    if importlib.util.find_spec("triton") is None or not (HELPERS / "triton_cases" / f"{op}.py").exists():
        return
    import triton_compile

    launches = triton_compile.compile_launches(f"cuda:{arch}")
    module = importlib.import_module(f"debiaskd.kernels.{op}")
    for case, call in triton_compile.cases_of(op, f"cuda:{arch}").items():
        launches.clear()
        call.call(module)
        for name, _, asm in launches:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
                cubin.write(asm["cubin"])
                cubin.flush()
                code = asm["ptx"] if kind == "ptx" else run(tool("cuobjdump"), "-sass", cubin.name)
                yield Kernel(f"kernels/{op}.py", f"{name}, {case}", *next(iter(usage(cubin.name).values())), code)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("sass", "ptx"))
    parser.add_argument("op")
    parser.add_argument("--arch", default="90")
    parser.add_argument("--kernel", help="a regular expression, searched in the names of the table")
    options = parser.parse_args()
    kernels = [*cuda(options.kind, options.op, options.arch), *triton(options.kind, options.op, options.arch)]
    if not kernels:
        raise SystemExit(
            f"no GPU kernel belongs to {options.op!r}: ops are named as the files in csrc/cuda and kernels"
        )
    print("registers spilled 16B loads   stores  kernel")
    print(*(kernel.row() for kernel in kernels), sep="\n")
    wanted = options.kernel or r"\.cu: .*float, (?:\d+, )?4\b|\.py: "
    for kernel in kernels:
        if re.search(wanted, f"{kernel.origin}: {kernel.name}"):
            print(f"\n==== {kernel.origin}: {kernel.name}\n{kernel.code.rstrip()}")


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when it is imported
    main()
