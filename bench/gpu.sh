#!/usr/bin/env bash
# Everything that wants a GPU, in one go: build, tests, compute-sanitizer, benchmarks.
#
#     bench/gpu.sh [OUT]        OUT, for results and logs, is bench/results by default
#
# PYTHON (by default the one of .venv, else python3) needs torch, triton, numpy, setuptools, pytest, hypothesis, pybind11
# and ninja; nothing is downloaded. BENCH_SECONDS (2) is how long each case is timed. A step that fails does not keep the
# others from running; the exit status says whether all went well.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-bench/results}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
logs=$out/logs
mkdir -p "$logs"
failed=()

step() {  # name, command...
  local name=$1
  shift
  echo "== $name"
  if "$@" >"$logs/$name.log" 2>&1; then
    tail -n 3 "$logs/$name.log"
  else
    echo "FAILED with exit status $?; the end of $logs/$name.log:"
    tail -n 30 "$logs/$name.log"
    failed+=("$name")
  fi
}

if ! "$python" -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then
  echo "bench/gpu.sh: PyTorch finds no CUDA device here" >&2
  exit 2
fi
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c "
import torch; print('{}.{}'.format(*torch.cuda.get_device_capability()))")}

DEBIASKD_CUDA=1 step build "$python" -m pip install --no-index --no-deps --no-build-isolation --editable .
step doctor "$python" -m debiaskd.cli doctor
step tests "$python" -m pytest -q --maxfail=50 tests
# Each allocation by itself, so that what lies beyond its end is nobody's; one call of every op is enough.
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -q tests/ops/test_gpu.py -k "no_op_waits and cuda-cuda"
  done
else
  echo "== compute-sanitizer is not installed: skipped"
fi
step bench "$python" -m debiaskd.bench --device cuda --seconds "${BENCH_SECONDS:-2}" --out "$out"
cat "$logs/bench.log"

if ((${#failed[@]})); then
  echo "bench/gpu.sh: failed: ${failed[*]}" >&2
  exit 1
fi
