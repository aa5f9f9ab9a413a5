"""Builds the native libraries: one for the schemas, one for the CPU, one for CUDA where nvcc is found.

They use PyTorch's stable ABI and no Python C API, so that one build serves every torch >= 2.10 and every Python: hence
plain shared libraries and a `py3-none-<platform>` wheel. A missing compiler is a warning and leaves the package to
run on eager; a compiler that fails is an error. Environment: DEBIASKD_CUDA=0/1 (never build for CUDA / fail where that
is impossible; by default, when nvcc is found), TORCH_CUDA_ARCH_LIST, CXX, NVCC, DEBIASKD_SANITIZE=1 (`make sanitize`).
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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


def flags(library):
    """(compiler's options, linker's options) of a library."""
    import torch
    from torch.utils.cpp_extension import include_paths

    includes = ["-Icsrc", *(word for path in include_paths() for word in ("-isystem", path))]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    common = ["-std=c++17", "-O3", TARGET, *includes]
    if library == "cuda":
        options = ["-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden", *architecture_flags()]
        return [*common, *options], ["-cudart", "static", *architecture_flags(), "-Xlinker=--no-as-needed", *libraries]
    options = ["-fopenmp-simd", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    checks = []
    if os.environ.get("DEBIASKD_SANITIZE") == "1":
        checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        options += ["-O1", "-g1", "-DDEBIASKD_SANITIZE", *checks]
    return [*common, *options, *checks], [*checks, "-Wl,--no-as-needed", *libraries]


def version(path):
    return subprocess.run([path, "--version"], capture_output=True, text=True).stdout


def compiled(library, path):
    """The library's object files, of which those are compiled whose source, headers, compiler or options changed.

    They lie in build/objects, in one folder per compiler and set of options, so that `make quickstart`, `make test` and
    a rebuild after an edit compile each source once.
    """
    import torch

    options, _ = flags(library)
    identity = json.dumps([version(path), torch.__version__, path, options])
    folder = ROOT / "build" / "objects" / f"{library}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    objects = {source: folder / f"{Path(source).stem}.o" for source in SOURCES[library]}

    def build(source, target):
        unfinished = target.with_name(f"{target.name}.{os.getpid()}")
        rules = unfinished.with_suffix(".d")
        command = [path, "-c", *options, "-MMD", "-MF", str(rules), source, "-o", str(unfinished)]
        started = time.time()
        # Not one of distutils' own errors, which an optional extension would swallow: a failing compiler is an error.
        subprocess.run(command, check=True, cwd=ROOT)
        os.utime(unfinished, (started, started))  # a source that changed meanwhile is newer
        rules.replace(target.with_suffix(".d"))
        unfinished.replace(target)  # last: an object that is there is whole

    stale = [(source, target) for source, target in objects.items() if not up_to_date(target)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda pair: build(*pair), stale):
            pass  # raises what a compiler raised
    return list(objects.values())


def up_to_date(target):
    """Whether an object file is newer than its source and every header that it was compiled from."""
    rules = target.with_suffix(".d")
    if not (target.exists() and rules.exists()):
        return False
    built = target.stat().st_mtime
    # A Makefile rule: `target: source header …`, folded by backslashes, with spaces in names escaped.
    names = re.split(r"(?<!\\)\s+", rules.read_text().replace("\\\n", " ").partition(": ")[2].strip())
    files = [ROOT / name.replace("\\ ", " ") for name in names]
    return all(file.exists() and file.stat().st_mtime < built for file in files)


class BuildLibraries(build_ext):
    """Each Extension is one shared library."""

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
                builds[library] = {"compiler": re.search(r".*\d+\.\d+.*", version(path)).group()}
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
        objects = [str(file) for file in compiled(library, path)]
        subprocess.run(
            [path, "-shared", *objects, "-o", str(output.resolve()), *flags(library)[1]], check=True, cwd=ROOT
        )


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(f"debiaskd.debiaskd_{name}", files, optional=True) for name, files in SOURCES.items()],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
