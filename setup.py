"""Builds the native libraries: one for the schemas, one for the CPU, one for CUDA where nvcc is found.

They use PyTorch's stable ABI and no Python C API, so that one build serves every torch >= 2.10 and every Python: hence
plain shared libraries and a `py3-none-<platform>` wheel. A missing compiler is a warning and leaves the package to
run on eager; a compiler that fails is an error. Environment: DEBIASKD_CUDA=0/1 (never build for CUDA / fail where that
is impossible; by default, when nvcc is found), TORCH_CUDA_ARCH_LIST, CXX, NVCC, DEBIASKD_SANITIZE=1 (`make sanitize`).
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
PATTERNS = {"schema": "csrc/schema.cpp", "cpu": "csrc/cpu/*.cpp", "cuda": "csrc/cuda/*.cu"}
SOURCES = {name: sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern)) for name, pattern in PATTERNS.items()}


def compiler(library):
    """(path, None) of the library's compiler, or (None, why there is none)."""
    switch = os.environ.get("DEBIASKD_CUDA")
    if switch not in (None, "", "0", "1"):
        raise SystemExit(f"DEBIASKD_CUDA must be 0 or 1, got {switch!r}")
    if library != "cuda":
        found = next(filter(None, map(shutil.which, os.environ.get("CXX", "g++ c++ clang++").split())), None)
        return (found, None) if found else (None, "no C++ compiler was found at install; install g++ and reinstall")
    if switch == "0":
        return None, "DEBIASKD_CUDA=0 at install"
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which("nvcc", path=f"{home}/bin")
    reason = None if SOURCES["cuda"] else "this version has no CUDA sources"
    reason = reason or (None if found else "nvcc was not found at install")
    if reason and switch == "1":
        raise SystemExit(f"DEBIASKD_CUDA=1, but {reason}")
    return (None, reason) if reason else (found, None)


def architecture_flags():
    for item in re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0;10.0+PTX"):
        number = item.removesuffix("+PTX").replace(".", "")
        yield f"-gencode=arch=compute_{number},code=sm_{number}"
        if item.endswith("+PTX"):
            yield f"-gencode=arch=compute_{number},code=compute_{number}"


def command(library, path, output):
    import torch
    from torch.utils.cpp_extension import include_paths

    includes = ["-Icsrc", *(word for path in include_paths() for word in ("-isystem", path))]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    common = ["-std=c++17", TARGET, *includes, *SOURCES[library], "-o", str(output)]
    if library == "cuda":
        flags = ["-O3", "-DUSE_CUDA", "--threads=0", "-cudart", "static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        return [path, "-shared", *flags, *architecture_flags(), *common, "-Xlinker=--no-as-needed", *libraries]
    flags = ["-O3", "-fopenmp-simd", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    if os.environ.get("DEBIASKD_SANITIZE") == "1":
        flags += ["-O1", "-g", "-DDEBIASKD_SANITIZE", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return [path, "-shared", *flags, *common, "-Wl,--no-as-needed", *libraries]


class BuildLibraries(build_ext):
    """Each Extension is one shared library, compiled and linked by one command."""

    def get_ext_filename(self, name):
        *package, library = name.split(".")
        return os.path.join(*package, f"lib{library}.so")

    def run(self):
        directory = ROOT / "debiaskd" if self.inplace else Path(self.build_lib) / "debiaskd"
        for stale in directory.glob("libdebiaskd_*.so"):
            stale.unlink()  # what an earlier build left must not pass for this one's
        super().run()
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "build_record.json").write_text(json.dumps(self.record(), indent=2) + "\n")

    def record(self):
        import torch

        builds = {"torch": torch.__version__, "python": platform.python_version(), "platform": platform.platform()}
        for library in SOURCES:
            path, reason = compiler(library)
            if path:
                version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
                builds[library] = {"compiler": re.search(r".*\d+\.\d+.*", version).group()}
            else:
                builds[library] = {"skipped": reason}
        return builds

    def build_extension(self, extension):
        library = extension.name.removeprefix("debiaskd.debiaskd_")
        path, reason = compiler(library)
        output = Path(self.get_ext_fullpath(extension.name))
        output.unlink(missing_ok=True)
        if reason:
            print(f"WARNING: debiaskd is built WITHOUT its {library} library: {reason}", file=sys.stderr)
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        # Not one of distutils' own errors, which an optional extension would swallow: a failing compiler is an error.
        subprocess.run(command(library, path, output.resolve()), check=True, cwd=ROOT)


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(f"debiaskd.debiaskd_{name}", files, optional=True) for name, files in SOURCES.items()],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
