#!/usr/bin/env bash
# On a machine with a GPU, in one call of under 10 minutes: build, test, check the CUDA ops' memory accesses, then time
# everything against the rivals. Results go to $OUT (by default ./gpu_results), from where benchmarks/report.py reads:
#   python benchmarks/report.py gpu_results/bench_*.json
set -uo pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-gpu_results}"
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
status=0
step() {  # name, seconds at most, command
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  local code=$?
  [ $code -eq 0 ] || status=1
  echo "$name: exit $code after $((SECONDS - start)) s: $(tail -1 "$OUT/$name.log")"
}
step build 90 python3 setup.py build_ext --inplace
step table 30 python3 -m revit_kernels
step tests 140 python3 -m pytest -q --maxfail=20 -p no:cacheprovider tests --ignore=tests/test_timm_zoo.py --ignore=tests/test_offline.py --ignore=tests/test_cuda.py
if [ -f revit_kernels/_cuda.so ] && command -v compute-sanitizer >/dev/null; then
  step sanitizer 60 compute-sanitizer --error-exitcode 1 python3 -m pytest -q -p no:cacheprovider tests -k "contract and cuda"
fi
# A file each, the most telling first: what its limit cuts off costs only that file's results.
bench() {  # name, seconds at most, pytest arguments
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" python3 -m pytest -q -p no:cacheprovider "benchmarks/$name.py" "$@" --benchmark-json="$OUT/$name.json"
}
bench bench_vit 80 -k "small and 256 and bfloat16 and not one_length"
bench bench_attention 60 -k "forward and bfloat16"
bench bench_captured 30 -k "small"
bench bench_layer_norm 25
bench bench_patch_embed 25
bench bench_pos_embed 15
bench bench_pool 15
exit $status
