#!/usr/bin/env bash
# On a machine with a GPU, in one call of under 10 minutes: build, test, check the CUDA ops' memory accesses, then time
# everything against the rivals. Results go to $OUT (by default ./gpu_results), from where benchmarks/report.py reads:
#   python benchmarks/report.py gpu_results/benchmarks.json
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
step build 120 python3 setup.py build_ext --inplace
step table 60 python3 -m revit_kernels
step tests 200 python3 -m pytest -q -x --maxfail=20 tests -p no:cacheprovider --ignore=tests/test_timm_zoo.py
if [ -f revit_kernels/_cuda.so ] && command -v compute-sanitizer >/dev/null; then
  step sanitizer 60 compute-sanitizer --error-exitcode 1 python3 -m pytest -q tests -k "cuda and contract" -p no:cacheprovider
fi
step benchmarks 240 python3 -m pytest -q benchmarks --benchmark-json="$OUT/benchmarks.json" -p no:cacheprovider
exit $status
