"""Compiles what the tests need of C++, with g++ and ninja: the CUDA sources for the CPU, and pybind11 modules.

Each build goes to a folder under build/ that the next run finds again; with sanitizers, to another one.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import ninja
import pybind11
import torch
from torch.utils.cpp_extension import include_paths

TESTS = Path(__file__).resolve().parents[1]
CSRC = TESTS.parent / "csrc"
SANITIZED = os.environ.get("DEBIASKD_SANITIZE") == "1"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


def build(target: str, sanitized: bool = SANITIZED) -> Path:
    """Compiles what has changed since the last time, and returns the file `target`, a name of `_rules`."""
    directory = TESTS.parent / "build" / ("tests_sanitized" if sanitized else "tests")
    directory.mkdir(parents=True, exist_ok=True)
    rules, text = directory / "build.ninja", _rules(sanitized)
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(directory), target]
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in several processes; released when it is closed
        if not rules.exists() or rules.read_text() != text:
            rules.write_text(text)
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the build of {target} in {directory} failed:\n{done.stdout}{done.stderr}")
    return directory / target


def module(name: str) -> ModuleType:
    """The pybind11 module of tests/native/<name>.cpp."""
    spec = importlib.util.spec_from_file_location(name, build(f"{name}.so"))
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _rules(sanitized: bool) -> str:
    includes = [f"-I{CSRC}", f"-I{TESTS / 'cuda_on_cpu'}", *(f"-isystem {path}" for path in include_paths())]
    includes += [f"-isystem {pybind11.get_include()}", f"-isystem {sysconfig.get_path('include')}"]
    checks = "-g1 -DDEBIASKD_SANITIZE -fsanitize=address,undefined -fno-sanitize-recover=all" if sanitized else ""
    sources = [CSRC / "schema.cpp", TESTS / "cuda_on_cpu/cuda_on_cpu.cpp", *sorted(CSRC.glob("cuda/*.cu"))]
    ops = [f"{source.name}.o" for source in sources]
    modules = sorted(TESTS.glob("native/*.cpp"))
    lines = [
        # Packs of several elements alias single ones, as they may in CUDA; `#pragma unroll` is nvcc's.
        "flags = -std=c++17 -O1 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -fno-strict-aliasing "
        f"{checks} -DTORCH_TARGET_VERSION=0x020a000000000000 -DDEBIASKD_NAMESPACE=debiaskd_on_cpu {' '.join(includes)}",
        "rule compile",
        f"  command = {COMPILER} $flags -MD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {COMPILER} -shared {checks} $in -o $out $libraries",
        *(f"build {source.name}.o: compile {source}" for source in [*sources, *modules]),
        f"build cuda_on_cpu.so: link {' '.join(ops)}",
        f"  libraries = -L{Path(torch.__file__).parent / 'lib'} -ltorch_cpu -lc10",
        *(f"build {source.stem}.so: link {source.name}.o cuda_on_cpu.cpp.o" for source in modules),
    ]
    return "\n".join(lines) + "\n"
