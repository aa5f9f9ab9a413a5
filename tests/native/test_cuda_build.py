"""The CUDA library as machine code: for which GPUs, without spilled registers, with memory accesses of 16 bytes."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from debiaskd.ops import backend

ROOT = Path(__file__).parents[2]
LIBRARY = backend.library_directory() / "libdebiaskd_cuda.so"
#: Kernels that move whole maps, as their mangled names begin, with the fewest 16-byte loads and stores in each.
HOT = {
    "match_kernelIfLi256ELi4E": (8, 4),
    "match_kernelIfLi32ELi4E": (8, 4),
    "match_kernelIN3c108BFloat16ELi256ELi8E": (4, 2),
    "match_kernelIN3c104HalfELi256ELi8E": (4, 2),
    "norm_kernelIfLi4E": (4, 0),
    "scale_kernelIfLi256ELi4E": (4, 4),
    "sum_kernelINS0_9OwnPixelsIfLi4EEELi0E": (4, 0),
    "sum_kernelINS0_9OwnPixelsIN3c108BFloat16ELi8EEELi0E": (2, 0),
    "gradient_kernelINS0_12PositiveBitsIfLi4EEEfLi0E": (0, 8),
    "gradient_kernelINS0_9OwnPixelsIfLi4EEEfLin1E": (4, 4),
    "place_sums_kernelIfLi4ELb0E": (8, 0),
    "place_sums_kernelIfLi4ELb1E": (4, 0),
    "place_sums_kernelIN3c108BFloat16ELi8ELb0E": (4, 0),
    "row_dots_kernelIfLi4ELb0E": (8, 0),
    "row_dots_kernelIN3c108BFloat16ELi8ELb0E": (8, 0),
    "scale_kernelIfLi4ELb1E": (4, 4),
    "scale_kernelIN3c108BFloat16ELi8ELb1E": (4, 4),
    "product_kernelIfLb0ELb0E": (4, 0),
    "product_kernelIfLb1ELb1E": (4, 0),
}


def cuobjdump() -> str | None:
    """NVIDIA's disassembler: of a CUDA installation, or the one that Triton brings along."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return found


pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library is not built: nvcc was not found"),
    pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump, which Triton's wheel has"),
    pytest.mark.xdist_group("cuda_build"),
]


def dump(*options: str) -> str:
    return subprocess.run([cuobjdump(), *options, str(LIBRARY)], capture_output=True, text=True, check=True).stdout


@functools.cache
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, mangled kernel) -> bytes and registers that it uses."""
    found, architecture, name = {}, "", ""
    for line in dump("--dump-resource-usage").splitlines():
        if line.startswith("arch ="):
            architecture = line.split()[-1]
        elif line.strip().startswith("Function"):
            name = line.split()[-1].rstrip(":")
        elif "REG:" in line:
            found[architecture, name] = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
    return found


def newest(architectures: Iterable[str]) -> str:
    return max(architectures, key=lambda architecture: int(re.search(r"\d+", architecture).group()))


def names(start: str) -> list[str]:
    return sorted({name for _, name in resources() if re.search(rf"\d{start}", name)})


def test_every_source_is_compiled_for_the_architectures_asked_for():
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0;10.0+PTX"
    wanted = {f"sm_{item.removesuffix('+PTX').replace('.', '')}" for item in re.split(r"[;\s]+", asked)}
    built = {architecture for architecture, _ in resources()}
    assert built == wanted
    each = [{name.split("_cu_")[0] for a, name in resources() if a == architecture} for architecture in built]
    assert all(sources == each[0] for sources in each)


def test_no_kernel_spills_registers_into_memory():
    assert resources()
    spilled = {
        (architecture, name): used
        for (architecture, name), used in resources().items()
        if used["LOCAL"] or used["STACK"]
    }
    assert not spilled


def test_static_shared_memory_leaves_room_for_what_launches_ask_for():
    """From sm_90 on the number includes 1 KiB that the hardware reserves."""
    static = int(re.search(r"kStaticShared = (\d+) \* 1024", (ROOT / "csrc/cuda/launch.cuh").read_text()).group(1))
    headers = {path.name: path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu*")}
    asking = {name for name, text in headers.items() if "DEBIASKD_DYNAMIC_SHARED(" in text} - {"launch.cuh"}
    assert asking
    for (_, kernel), used in resources().items():
        asks = any(
            re.search(rf"\d{source.stem}_cu_", kernel) and any(n.startswith(source.stem) for n in asking)
            for source in (ROOT / "csrc/cuda").glob("*.cu")
        )
        assert used["SHARED"] <= (static if asks else 48) * 1024 + 1024, kernel


def test_the_newest_architecture_is_the_one_of_the_largest_number():
    assert newest({"sm_80", "sm_100", "sm_90"}) == "sm_100"


@pytest.mark.parametrize("start", HOT)
def test_whole_maps_move_in_accesses_of_16_bytes(start):
    found = names(start)
    assert found, f"no kernel is called {start}..."
    architecture = newest({a for a, name in resources() if name in found})
    for name in found:
        code = dump("-sass", "-arch", architecture, "-fun", name)
        loads, stores = (len(re.findall(rf"\b{op}\.E\.\S*128", code)) for op in ("LDG", "STG"))
        assert (loads, stores) >= HOT[start], (name, loads, stores)
        assert stores >= HOT[start][1]


def test_products_of_exponentials_are_in_full_float32():
    found = names("product_kernelIf")
    assert len(found) == 3
    for name in found:
        code = dump("-sass", "-arch", "sm_90", "-fun", name)
        assert re.search(r"\bFFMA\b", code)
        assert not re.search(r"\b(HMMA|QGMMA|HGMMA)\b|TF32", code)


def test_a_narrow_kernel_would_be_noticed():
    code = dump("-sass", "-arch", "sm_90", "-fun", names("match_kernelIfLi256ELi1E")[0])
    assert re.search(r"\bLDG\.E", code)
    assert not re.search(r"\b(LDG|STG)\.E\.\S*128", code)
