"""The native libraries as files: what they need of the system that runs them; one build serves every PyTorch."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest

from debiaskd.ops import backend

ROOT = Path(__file__).parents[2]
LIBRARIES = sorted(backend.library_directory().glob("libdebiaskd_*.so"))
OLD_PYTHON = os.environ.get("DEBIASKD_OLD_PYTHON")
every_library = pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
needs_old_python = pytest.mark.skipif(
    not OLD_PYTHON, reason="DEBIASKD_OLD_PYTHON names no interpreter; `make abi` does"
)
needs_binutils = pytest.mark.skipif(not (shutil.which("nm") and shutil.which("readelf")), reason="needs binutils")


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="built without a C++ compiler")
def test_schema_and_cpu_libraries_are_built_where_there_is_a_compiler():
    assert {"libdebiaskd_schema.so", "libdebiaskd_cpu.so"} <= {path.name for path in LIBRARIES}
    assert "cpp" not in backend.unavailable


@every_library
@needs_binutils
def test_library_needs_no_python(library):
    undefined = {line.split()[-1] for line in output_of("nm", "-D", "--undefined-only", str(library)).splitlines()}
    assert any("torch" in symbol for symbol in undefined)  # that the list is one
    assert not [symbol for symbol in undefined if symbol.lstrip("_").startswith("Py")]
    assert not [line for line in output_of("readelf", "-d", str(library)).splitlines() if "libpython" in line]


@every_library
@needs_binutils
def test_library_needs_no_c_plus_plus_of_pytorch(library):
    # Mangled names in PyTorch's namespaces change from one version to the next; its stable ABI is plain C.
    undefined = {line.split()[-1] for line in output_of("nm", "-D", "--undefined-only", str(library)).splitlines()}
    mangled = [symbol for symbol in undefined if symbol.startswith("_Z")]
    assert not [symbol for symbol in mangled if any(part in symbol for part in ("2at", "3c10", "5torch"))]


@every_library
@needs_binutils
def test_library_exports_nothing_that_could_clash(library):
    defined = [line.split()[-1] for line in output_of("nm", "-D", "--defined-only", str(library)).splitlines()]
    # Templates and inline functions of the standard library and of PyTorch's headers are weak and shared by design.
    assert not [symbol for symbol in defined if "debiaskd" in symbol]


def test_build_record_says_what_was_built_with_what():
    record = backend.build_record()
    assert {"torch", "python", "platform", "schema", "cpu", "cuda"} <= set(record)
    for library in ("schema", "cpu", "cuda"):
        built = (backend.library_directory() / f"libdebiaskd_{library}.so").exists()
        assert ("compiler" if built else "skipped") in record[library]


#: Runs in another interpreter with another PyTorch, and prints the largest difference between cpp and eager.
COMPARE = """
import json, torch, debiaskd as dk
from debiaskd.ops import backend

torch.set_num_threads(1)

def boxes(*lists):
    return dk.Boxes.from_lists(list(lists))

def results(name, dtype):
    torch.manual_seed(0)
    features = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    maps = torch.rand(3, 9, 40, dtype=torch.float64)
    maps[:, ::3, ::3] = 0  # behind a ReLU; clamp and log have kinks there
    out = []
    def run(loss, values):
        values = values.to(dtype).detach().clone().requires_grad_()
        for scale in (1.0, 3.0):
            result = loss(values) * scale
            gradient, = torch.autograd.grad(result.sum(), values)
            out.extend([result.detach().double(), gradient.double()])
        with torch.no_grad():
            out.append(loss(values).double())
    with dk.backend(name):
        for options in ({}, {"normalize": True}, {"weight": torch.rand(3), "reduction": "sum"}, {"reduction": "none"}):
            run(lambda s: dk.feature_match_loss(s, features.flip(0).to(dtype), **options), features)
            run(lambda s: dk.feature_match_loss(s, features.flip(0).to(dtype), **options), features.mT)
        found = boxes([[2, 1, 30, 6], [5, 5, 60, 8]], [], None)
        for kind in ("energy", "l1", "ppce", "rrr"):
            for size in (None, (18, 80)):
                for normalize in (False, True):
                    run(lambda a: dk.localization_loss(a, found, kind=kind, size=size, normalize=normalize), maps)
    return out

chosen = {op: backend.choose(op, torch.zeros(1)) for op in ("feature_match", "localization")}
worst = 0.0
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for a, e in zip(results("cpp", dtype), results("eager", dtype), strict=True):
        tolerance = 4 * torch.finfo(dtype).eps * e.abs().max().clamp(min=1e-3)
        worst = max(worst, ((a - e).abs().max() / tolerance).item() if a.isfinite().all() else float("inf"))
print(json.dumps({"torch": torch.__version__, "chosen": chosen, "worst": worst}))
"""


def run_in(python, *arguments, folder, environment):
    """As processes.run, in any Python."""
    if python == sys.executable:
        return processes.run(*arguments, folder=folder, environment=environment)
    variables = {**os.environ, **environment}
    return subprocess.run([python, *arguments], capture_output=True, text=True, env=variables, cwd=folder)


def compare_in(python):
    environment = {"PYTHONPATH": str(ROOT), "DEBIASKD_LIBRARY_DIR": str(backend.library_directory())}
    result = run_in(python, "-c", COMPARE, folder="/", environment=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.xdist_group("processes")
@pytest.mark.skipif("cpp" in backend.unavailable, reason="the native CPU library is not built")
@pytest.mark.parametrize(
    "python",
    [
        pytest.param(sys.executable, id="this"),
        pytest.param(OLD_PYTHON, id="oldest", marks=needs_old_python),
    ],
)
def test_these_very_libraries_agree_with_eager_under_another_pytorch(python):
    seen = compare_in(python)
    assert set(seen["chosen"].values()) == {"cpp"}
    assert seen["worst"] <= 1, seen
    if python == OLD_PYTHON:
        assert seen["torch"].startswith("2.10."), seen  # the oldest version that pyproject.toml allows


@functools.cache
def _old_headers():
    list_paths = "from torch.utils.cpp_extension import include_paths; print(*include_paths(), sep='\\n')"
    return output_of(OLD_PYTHON, "-c", list_paths).splitlines()


@pytest.mark.compiles
@needs_old_python
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize(
    "source",
    sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")]),
    ids=lambda path: path.name,
)
def test_sources_compile_with_the_headers_of_the_oldest_pytorch(source):
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda_on_cpu'}"]
    includes += [word for path in _old_headers() for word in ("-isystem", path)]
    # CUDA sources as C++ for the CPU, which takes seconds; what only nvcc reads of them the probe below includes.
    flags = ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-w", "-fsyntax-only", "-x", "c++"]
    done = subprocess.run(["g++", *flags, *includes, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- CUDA ----

PROBE = """
#include "common/bilinear.h"
#include "common/localization.h"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

__global__ void kernel(double* out) { out[threadIdx.x] = debiaskd::bilinear_tap(threadIdx.x, 32, 7).weight; }

void scale(debiaskd::Tensor gradient, const debiaskd::Tensor&) {
  debiaskd::Scratch scratch(gradient);
  debiaskd::Device(gradient).launch({1, 32}, kernel, scratch.doubles(32));
}

DEBIASKD_CUDA_LIBRARY(m) { m.impl("feature_match_scale_", TORCH_BOX(&scale)); }
"""


BUILD = ("-q", "build_ext", "--build-lib", "out")


def build_with_probe(folder, python=sys.executable, **environment):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "debiaskd").mkdir()
    shutil.copy(ROOT / "debiaskd" / "version.py", folder / "debiaskd" / "version.py")
    for source in folder.glob("csrc/cuda/*.cu"):
        source.unlink()  # the probe is enough, and quicker
    (folder / "csrc" / "cuda" / "probe.cu").write_text(PROBE)
    # No C++ compiler of that name: this is about the other library.
    return run_in(python, "setup.py", *BUILD, folder=folder, environment={"CXX": "no-such-compiler", **environment})


@pytest.mark.xdist_group("processes")
@pytest.mark.compiles
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize(
    "python",
    [pytest.param(sys.executable, id="this"), pytest.param(OLD_PYTHON, id="oldest", marks=needs_old_python)],
)
def test_cuda_sources_become_a_library_of_their_own(tmp_path, python):
    done = build_with_probe(tmp_path, python, DEBIASKD_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0+PTX")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/debiaskd/libdebiaskd_cuda.so").stat().st_size > 0
    record = json.loads((tmp_path / "out/debiaskd/build_record.json").read_text())
    assert "release" in record["cuda"]["compiler"]


@pytest.mark.xdist_group("processes")
def test_cuda_is_left_out_on_request_and_missing_compilers_are_warnings(tmp_path):
    done = build_with_probe(tmp_path, DEBIASKD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("out/**/*.so")) == []
    assert done.stderr.count("WARNING") == 3  # one line a library
    record = json.loads((tmp_path / "out/debiaskd/build_record.json").read_text())
    assert record["cuda"] == {"skipped": "DEBIASKD_CUDA=0 at install"}
    assert "no C++ compiler" in record["cpu"]["skipped"]


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DEBIASKD_CUDA": "yes"}, "DEBIASKD_CUDA must be 0 or 1, got 'yes'"),
        ({"DEBIASKD_CUDA": "1", "NVCC": "no-such-nvcc", "CUDA_HOME": "/nowhere"}, "DEBIASKD_CUDA=1, but nvcc was not"),
    ],
)
def test_a_cuda_build_that_was_asked_for_and_cannot_be_is_an_error(tmp_path, environment, message):
    done = build_with_probe(tmp_path, **environment)
    assert done.returncode != 0
    assert message in done.stderr


#: A compiler that notes what it compiles, with the headers that a source names: no machine code is needed for this.
COMPILER = """#!/bin/sh
[ "$1" = --version ] && echo "stand-in 1.0" && exit
for word; do case "$before" in -MF) rules=$word;; -o) output=$word;; esac
  case "$word" in *.cpp) source=$word;; esac; before=$word; done
[ -z "$source" ] || echo "$source" >> "$NOTES"
[ -z "$rules" ] || headers=$(sed -n 's/#include "\\(.*\\)"/csrc\\/\\1/p' $source | tr '\\n' ' ')
[ -z "$rules" ] || echo "$output: $source $headers" > "$rules"
! grep -qs "#error" "$source" || exit 1
: > "$output"
"""


@pytest.fixture
def compiles(tmp_path):
    """(the folder, a function that builds in it and gives the sources that were compiled)."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in ("debiaskd", "csrc/cpu", "csrc/common"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "debiaskd" / "version.py", tmp_path / "debiaskd" / "version.py")
    for name, headers in {"schema": (), "cpu/one": ("common/a.h",), "cpu/two": ("common/a.h", "common/b.h")}.items():
        (tmp_path / "csrc" / f"{name}.cpp").write_text("".join(f'#include "{header}"\n' for header in headers))
    for header in ("a", "b"):
        (tmp_path / "csrc" / "common" / f"{header}.h").write_text("")
    compiler, notes = tmp_path / "stand-in", tmp_path / "notes"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)

    def build(**environment):
        notes.write_text("")
        variables = {"CXX": str(compiler), "DEBIASKD_CUDA": "0", "NOTES": str(notes), **environment}
        done = processes.run("setup.py", *BUILD, folder=tmp_path, environment=variables)
        return done, sorted(Path(line).stem for line in notes.read_text().splitlines())

    return tmp_path, build


@pytest.mark.xdist_group("processes")
def test_a_source_is_compiled_again_only_if_it_or_a_header_of_it_changed(compiles):
    folder, build = compiles
    done, sources = build()
    assert done.returncode == 0, done.stderr
    assert sources == ["one", "schema", "two"]
    assert build()[1] == []
    (folder / "csrc/cpu/one.cpp").write_text('#include "common/a.h"\n// edited\n')
    assert build()[1] == ["one"]
    (folder / "csrc/common/b.h").write_text("// edited\n")
    assert build()[1] == ["two"]
    assert build(DEBIASKD_SANITIZE="1")[1] == ["one", "schema", "two"]  # other options, objects of their own
    assert build()[1] == []


@pytest.mark.xdist_group("processes")
def test_a_source_that_does_not_compile_is_an_error_each_time(compiles):
    folder, build = compiles
    (folder / "csrc/cpu/two.cpp").write_text("#error\n")
    for _ in range(2):
        done, sources = build()
        assert done.returncode != 0
        assert "two" in sources
        assert not list(folder.glob("out/**/libdebiaskd_cpu.so"))
    (folder / "csrc/cpu/two.cpp").write_text("\n")
    done, sources = build()
    assert done.returncode == 0, done.stderr
    assert sources == ["two"]
