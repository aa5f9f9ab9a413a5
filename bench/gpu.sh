#!/usr/bin/env bash
# Build, test and measure on a GPU in eight minutes. Needs no network and changes nothing outside of this tree.
#
#     bench/gpu.sh [OUT]        OUT (bench/results by default) gets one JSON of results and one log, gpu.log
#
# The parts run in order of their value, each under its own time limit; a part that fails or runs out of time does not
# stop the others, and the exit status says whether all went well. Each benchmark case is in the JSON as soon as it is
# measured; `python -m debiaskd.bench --pictures JSON` draws it later.
#
# PYTHON        the Python to use: by default that of .venv, else python3; 3.11 or newer with torch, triton, numpy,
#               setuptools, pytest, pytest-xdist, hypothesis, pybind11 and ninja. It may be read-only: the libraries and
#               the packages' folders lie in build/gpu.
# GPU_SECONDS   for everything (480); the parts' limits grow with it.   BENCH_SECONDS   of timing for each case (1).   PROCESSES   of the tests (12).
# GPU_DRY_RUN=1 runs every part on the CPU, with tiny inputs, on the libraries that are there; the compilers of its build
#               are replaced by a script that creates empty files.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-bench/results}
dry=${GPU_DRY_RUN:-0}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || echo python3)}
if [ "$dry" != 1 ] && ! "$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then
  echo "bench/gpu.sh: PyTorch finds no CUDA device here" >&2
  exit 2
fi
mkdir -p "$out" build/gpu
work=$(mktemp -d "$PWD/build/gpu/run.XXXXXX")
trap 'rm -rf "$work"' EXIT
seconds=${GPU_SECONDS:-480}
end=$((SECONDS + seconds))
export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1  # without the latter `-m` would find ./debiaskd first, which has no kernels

# The package as it is installed, made of links: debiaskd with kernels, recipes and bench in it.
mkdir -p "$work/path/debiaskd"
ln -s "$PWD"/debiaskd/* "$PWD"/kernels "$PWD"/recipes "$PWD"/bench "$work/path/debiaskd/"
export PYTHONPATH=$work/path${PYTHONPATH:+:$PYTHONPATH}

if [ "$dry" = 1 ]; then
  device=cpu ops=(feature_match localization) native=(cpp) processes=0
  brief=(--quick --threads 1 --providers eager cpp) networks=(test_resnet:2 --size 64 --rounds 1 --threads 1)
  export OMP_NUM_THREADS=1
  cat >build/gpu/compiler <<'COMPILER'
#!/bin/sh
# Stands for g++ and nvcc: creates the files that they would, and says for which architectures.
[ "$1" = --version ] && echo "dry run 0.0" && exit
while [ $# -gt 0 ]; do
  case $1 in -o | -MF) : >"$2" ;; -gencode=*) echo "compiler $1" ;; esac
  shift
done
COMPILER
  chmod +x build/gpu/compiler
  compilers=(CXX="$PWD/build/gpu/compiler" NVCC="$PWD/build/gpu/compiler" TORCH_CUDA_ARCH_LIST=9.0)
  library=$work/lib
else
  device=cuda ops=(feature_match localization map_cosine channel_dot backdoor class_relation) native=(cuda triton)
  processes=${PROCESSES:-12} networks=(resnet18:64 resnet50:32)
  brief=(--brief --providers eager compile cuda triton loop naive)
  compilers=(TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$("$python" -c "
import torch; print('{}.{}'.format(*torch.cuda.get_device_capability()))")}")
  library=build/gpu
  export DEBIASKD_LIBRARY_DIR=$PWD/build/gpu/debiaskd
fi
failed=()

part() {  # name, seconds, command...
  local name=$1 limit=$(($2 * seconds / 480)) left=$((end - SECONDS)) begin=$SECONDS status
  shift 2
  if ((left < 5)); then
    echo "== $name: skipped, no time is left"
    failed+=("$name")
    return
  fi
  echo "== $name"
  timeout --kill-after=5 $((left < limit ? left : limit)) "$@" 2>&1
  status=$?
  if ((status == 0)); then
    echo "== $name: done in $((SECONDS - begin)) s"
  else
    echo "== $name: FAILED after $((SECONDS - begin)) s, $( ((status == 124)) && echo out of time || echo exit status "$status")"
    failed+=("$name")
  fi
}

sanitizes() {  # whether compute-sanitizer is here and knows the device
  command -v compute-sanitizer >/dev/null || return 1
  ! compute-sanitizer "$python" -c "import torch; torch.ones(1, device='cuda')" 2>&1 | grep -qi "not supported"
}

all() {
  local op tool check pytest=("$python" -m pytest -q --tb=line -n "$processes" -p no:cacheprovider)
  part build 150 env DEBIASKD_CUDA=1 "${compilers[@]}" \
    "$python" setup.py -q build_ext --build-lib "$library" --build-temp "$work/temp"
  part doctor 30 "$python" -m debiaskd.cli doctor
  part gpu-tests 60 "${pytest[@]}" tests/ops/test_gpu.py
  part each-dtype 60 "${pytest[@]}" -m "not cuda_on_cpu" tests/ops/test_each_dtype.py
  for op in "${ops[@]}"; do
    part "bench-$op" 60 "$python" -m debiaskd.bench "$op" --device "$device" --seconds "${BENCH_SECONDS:-1}" \
      --append --out "$out" "${brief[@]}"
  done
  check=("$python" -m debiaskd.bench --device "$device" --quick --check --providers "${native[@]}")
  if [ "$dry" != 1 ] && sanitizes; then
    for tool in memcheck racecheck; do  # each allocation by itself: what lies beyond its end is nobody's
      part "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 "${check[@]}"
    done
  else
    echo "== compute-sanitizer is not here, or does not know the device: the same calls run without it"
    part calls 60 "${check[@]}"
  fi
  part guidance 90 "$python" -m debiaskd.bench.guidance --device "$device" --out "$out" --models "${networks[@]}"
  if ((${#failed[@]})); then
    echo "bench/gpu.sh: failed: ${failed[*]}"
    return 1
  fi
}

all | tee "$out/gpu.log"
exit "${PIPESTATUS[0]}"
