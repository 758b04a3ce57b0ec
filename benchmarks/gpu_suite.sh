#!/usr/bin/env bash
# On a machine with a GPU, in one call of under 10 minutes: build, test, check the CUDA ops' memory accesses and races,
# time everything against the rivals, profile the kernels, and write gpu.json and gpu.md into $OUT (./gpu_results).
#
#   benchmarks/gpu_suite.sh              all of it
#   benchmarks/gpu_suite.sh --tiny       the same stages on a few cases, on any machine: shows that it runs
#   benchmarks/gpu_suite.sh --list       the stages and their limits, and nothing run
#   benchmarks/gpu_suite.sh STAGE...     these stages only; the report is of all that $OUT holds
#
# RIVALS=SITE brings in what `benchmarks/gpu_rivals.py install FOLDER SITE` unpacked. PYTHON names the interpreter.
# A stage that fails, runs out of time or lacks its tool does not stop the others: gpu.md says so. Exit status 1 then.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-gpu_results}"
PYTHON="${PYTHON:-python3}"
TOTAL="${TOTAL:-570}" # seconds for all stages together
tiny=0 list=0 only=()
for argument in "$@"; do
  case "$argument" in
    --tiny) tiny=1 ;;
    --list) list=1 ;;
    -*) echo "unknown option $argument" >&2; exit 2 ;;
    *) only+=("$argument") ;;
  esac
done
[ -n "${RIVALS:-}" ] && . "$RIVALS/env.sh"
export PYTHONUNBUFFERED=1
[ $list = 1 ] || mkdir -p "$OUT"
[ $list = 1 ] || [ ${#only[@]} -gt 0 ] || rm -f "$OUT"/*.json "$OUT"/*.jsonl "$OUT"/*.log "$OUT"/stages.tsv "$OUT"/ncu.csv
status=0

wanted() {
  [ ${#only[@]} -eq 0 ] && return 0
  local name
  for name in "${only[@]}"; do [ "$name" = "$1" ] && return 0; done
  return 1
}

# name, exit (or why it was not run), seconds, limit, last line: what gpu_report.py makes the table of stages from
note() {
  printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" "$5" >>"$OUT/stages.tsv"
  echo "$1: $2 after $3 s of $4: $5"
}

step() { # name, seconds at most, command
  local name=$1 limit=$2 start=$SECONDS code last left
  shift 2
  wanted "$name" || return 0
  if [ $list = 1 ]; then
    echo "$name ($limit s): $*"
    return 0
  fi
  left=$((TOTAL - SECONDS))
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    note "$name" "not run" 0 0 "no time left"
    status=1
    return 0
  fi
  # INT first: pytest then ends its session, and what was measured until then is written.
  timeout --signal=INT --kill-after=8 "$limit" "$@" >"$OUT/$name.log" 2>&1
  code=$?
  last=$(grep -v '^[[:space:]]*$' "$OUT/$name.log" | tail -1 | tr '\t' ' ' | cut -c1-200)
  [ $code -eq 0 ] || status=1
  case $code in
    0) code=ok ;;
    124 | 137) code="out of time" ;;
    *) code="exit $code" ;;
  esac
  note "$name" "$code" $((SECONDS - start)) "$limit" "$last"
}

tool() { # program, stage: whether the program is there; else says so
  wanted "$2" || return 1
  [ $list = 1 ] && return 0
  command -v "$1" >/dev/null && return 0
  note "$2" "not run" 0 0 "there is no $1"
  status=1
  return 1
}

ops=(attention layer_norm patch_embed pool pos_embed linear)
files=() && for op in "${ops[@]}"; do files+=("tests/test_$op.py"); done
files+=(tests/test_rival_attention.py)
rest=(--ignore=tests/test_timm_zoo.py --ignore=tests/test_offline.py --ignore=tests/test_cuda.py)
for file in "${files[@]}"; do rest+=("--ignore=$file"); done
run=("$PYTHON" -m pytest -q -p no:cacheprovider)
if [ $tiny = 1 ]; then
  build=("$PYTHON" -c "import revit_kernels; print('nothing built')")
  tests=("${run[@]}" tests/test_pool.py -k "contract and reference")
  others=("${run[@]}" tests/test_grids.py)
  checked=(-k "contract and cuda and bfloat16 and one")
  attention="forward and 50 and bfloat16 and (bucketed or fa or cudnn)" vit="small and bfloat16 and bucketed and not one_length"
  compiled="small and bfloat16 and compiled" captured="small and 1 and captured and not host"
  linear="bench_forward and bfloat16 and gelu and not compiled" norm="bench_forward and 2920-384 and bfloat16" few=(--maxfail=1 --rounds 3) rounds=(--rounds 3)
else
  build=("$PYTHON" setup.py build_ext --inplace)
  tests=("${run[@]}" --maxfail=30 "${files[@]}")
  others=("${run[@]}" --maxfail=30 tests "${rest[@]}")
  checked=(-k "contract and cuda and bfloat16 and (menu or edges or odd or one)")
  attention="bfloat16 and not loop" vit="small and 256 and bfloat16 and not one_length and not compiled"
  compiled="small and 256 and bfloat16 and compiled" captured="small and not host"
  linear="(bench_triton or bench_fp8) and (50432 or 1576) and 768" norm="bfloat16" few=() rounds=()
fi

step build 90 "${build[@]}"
step table 20 "$PYTHON" -m revit_kernels
step ceilings 20 "$PYTHON" benchmarks/gpu_report.py "$OUT" --ceilings
step tests 90 "${tests[@]}"
for check in memcheck racecheck; do
  if tool compute-sanitizer $check; then
    step $check 45 compute-sanitizer --tool $check --error-exitcode 1 "${run[@]}" "${files[@]:0:5}" "${checked[@]}"
  fi
done
bench() { # name, seconds at most, file, pytest arguments; each row is written as soon as it is measured
  local name=$1 limit=$2 file=$3
  shift 3
  export REVIT_BENCH_ROWS="$OUT/$name.jsonl"
  [ $list = 1 ] || ! wanted "$name" || rm -f "$REVIT_BENCH_ROWS"
  step "$name" "$limit" "${run[@]}" -rs "benchmarks/$file.py" "$@" --benchmark-json="$OUT/$name.json"
}
bench bench_attention 120 bench_attention -k "$attention" "${rounds[@]}"
bench bench_vit 50 bench_vit -k "$vit" "${rounds[@]}"
if tool ncu ncu; then
  metrics=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread
  step ncu 40 ncu --profile-from-start off --clock-control none --csv --page raw --metrics "$metrics" \
    --log-file "$OUT/ncu.csv" "$PYTHON" benchmarks/gpu_profile.py
fi
bench bench_layer_norm 25 bench_layer_norm -k "$norm" "${rounds[@]}"
bench bench_linear 40 bench_linear -k "$linear" "${rounds[@]}"
bench bench_patch_embed 20 bench_patch_embed "${few[@]}"
bench bench_pos_embed 10 bench_pos_embed "${few[@]}"
bench bench_pool 10 bench_pool "${few[@]}"
bench bench_captured 25 bench_captured -k "$captured"
bench bench_vit_compiled 60 bench_vit -k "$compiled"
step more_tests 60 "${others[@]}"
[ $list = 1 ] || "$PYTHON" benchmarks/gpu_report.py "$OUT" || status=1
exit $status
