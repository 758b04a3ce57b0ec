#!/usr/bin/env bash
# On a machine with a GPU, in two calls: are the kernels right, and are they fast?
#
#   benchmarks/gpu_suite.sh check          at most 150 s: contracts of every op and backend, memory and race checks
#   benchmarks/gpu_suite.sh measure        at most 400 s: every kernel and model against its rivals and its ceilings
#   benchmarks/gpu_suite.sh CALL --tiny    the same stages on a few cases, on any machine: shows that they run
#   benchmarks/gpu_suite.sh CALL --list    the stages and their limits, and nothing run
#
# Each writes CALL.md, CALL.json and CALL_logs.tar.gz into $OUT (./gpu_results) and prints CALL.md last.
# STAGES="one two" runs these alone. TOTAL=SECONDS replaces the limit of the call. PYTHON names the interpreter.
# RIVALS=SITE brings in what `benchmarks/gpu_rivals.py install FOLDER SITE` unpacked. The package need not be installed:
# libraries built elsewhere are used where they load, else they are built here.
# A stage that fails, runs out of time or lacks its tool does not stop the others: CALL.md says so. Exit status 1 then.
set -uo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
call=${1:-} tiny=0 list=0
case "$call" in check) total=150 ;; measure) total=400 ;; *) usage ;; esac
shift
for argument in "$@"; do
  case "$argument" in --tiny) tiny=1 ;; --list) list=1 ;; *) usage ;; esac
done
OUT=$(realpath -m "${OUT:-gpu_results}")
PYTHON="${PYTHON:-python3}"
TOTAL="${TOTAL:-$total}" # seconds for all stages together
STAGES="${STAGES:-}"
[ -n "${RIVALS:-}" ] && . "$RIVALS/env.sh"
export PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONPATH="$PWD:$PWD/tests:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
WORK="$OUT/$call"
[ $list = 1 ] || { rm -rf "$WORK" && mkdir -p "$WORK"; }
[ $tiny = 0 ] || export REVIT_BENCH_TINY=1
export REVIT_FAILURES="$WORK/failures.jsonl"

wanted() { [ -z "$STAGES" ] || case " $STAGES " in *" $1 "*) ;; *) return 1 ;; esac; }

# name, exit (or why it was not run), seconds, limit, last line: what gpu_report.py makes the table of stages from
note() {
  printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" "$5" >>"$WORK/stages.tsv"
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
  [ $tiny = 0 ] || limit=$((limit * 8)) # a busy machine of two cores may take long to import torch
  left=$((TOTAL - SECONDS))
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 4 ]; then
    note "$name" "not run" 0 0 "no time left"
    return 0
  fi
  # INT first: pytest then ends its session, and what was measured until then is written. What a stage started and did
  # not end, pytest's workers say, would slow the stages after it.
  setsid bash -c 'echo $$ >"$0"; exec timeout "$@"' "$WORK/$name.pid" --signal=INT --kill-after=5 "$limit" "$@" \
    >"$WORK/$name.log" 2>&1
  code=$?
  kill -KILL -- "-$(cat "$WORK/$name.pid")" 2>/dev/null
  rm -f "$WORK/$name.pid"
  last=$(grep -v '^[[:space:]]*$' "$WORK/$name.log" | tail -1 | tr '\t' ' ' | cut -c1-200)
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
  return 1
}

pytest=("$PYTHON" -m pytest -q -p no:cacheprovider -p gpu_guard)
ops=(attention temporal_attention layer_norm patch_embed pool pos_embed linear)
contracts=(tests/ops/test_promises.py) && for op in "${ops[@]}"; do contracts+=("tests/ops/test_$op.py"); done
models=(tests/test_packing.py tests/test_device_cache.py tests/engines/test_captured.py tests/training/test_training.py tests/adaptive/test_adaptive.py)
models+=(tests/models/test_{vit,resizable,timm_api}.py)
slow="not compiles and not registration and not every_instruction_set and not instruction"

libraries() { # those carried here, if they load; else built, file by file on all cores
  local works="from revit_kernels import native; native.load('cpu'); native.load('cuda'); print('carried libraries load')"
  local build="$PYTHON -c \"$works\" || $PYTHON setup.py build_ext --inplace"
  [ $tiny = 0 ] || build="$PYTHON -c 'import revit_kernels; print(\"nothing built\")'"
  step build "$1" bash -c "$build"
}

smoke=() # op.backend of every kernel of a GPU that there is
for backend in cuda triton flash_attn cudnn; do
  for op in "${ops[@]}"; do [ ! -f "revit_kernels/ops/$op/$backend.py" ] || smoke+=("$op.$backend"); done
done

check() {
  local workers=16 cuda="cuda and not triton" model="$slow" sanitized=()
  local others="triton and not torch.float16 or flash_attn or cudnn or vendor"
  for kernel in "${smoke[@]}"; do case $kernel in *.cuda) sanitized+=("$kernel") ;; esac; done
  if [ $tiny = 1 ]; then
    workers=2 contracts=(tests/ops/test_pool.py) models=(tests/test_grids.py) model="not none" sanitized=(pool.reference)
    cuda="contract and cuda and menu" others="contract and float32 and one and (triton or vendor)"
  fi
  libraries 40
  step table 8 "$PYTHON" -m revit_kernels
  step contracts_cuda 35 "${pytest[@]}" -n "$workers" "${contracts[@]}" -k "($cuda) and $slow"
  # What compute-sanitizer sees is each allocation, so torch must not pool them. Side by side: none is timed. initcheck
  # does not see what the vendor's products of a backward write through TMA; racecheck might mistake the barriers of
  # TMA, so the path without them is checked too.
  local jobs=() sanitize=(compute-sanitizer --error-exitcode 1 --tool) script=("$PYTHON" benchmarks/gpu_smoke.py)
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for check in memcheck racecheck synccheck; do
    if tool compute-sanitizer $check; then step $check 50 "${sanitize[@]}" $check "${script[@]}" "${sanitized[@]}" & jobs+=($!); fi
  done
  if tool compute-sanitizer initcheck; then
    step initcheck 50 "${sanitize[@]}" initcheck "${script[@]}" --forward "${sanitized[@]}" & jobs+=($!)
  fi
  if tool compute-sanitizer racecheck_ampere; then
    REVIT_CUDA_HOPPER=0 step racecheck_ampere 50 "${sanitize[@]}" racecheck "${script[@]}" "${sanitized[@]:0:1}" & jobs+=($!)
  fi
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
  step contracts_others 60 "${pytest[@]}" -n "$workers" "${contracts[@]}" -k "($others) and $slow"
  step models 40 "${pytest[@]}" -n "$workers" "${models[@]}" -k "$model"
  [ ${#jobs[@]} -eq 0 ] || wait "${jobs[@]}"
}

bench() { # name, seconds at most, file, pytest arguments; each row is written as soon as it is measured
  local name=$1 limit=$2 file=$3
  shift 3
  REVIT_BENCH_ROWS="$WORK/$name.jsonl" step "$name" "$limit" "${pytest[@]}" -rs "benchmarks/$file.py" "$@"
}

measure() {
  local rounds=() few=() attention="bfloat16 and not loop" linear="(bench_triton or bench_fp8) and (50432 or 1576) and 768"
  local vit="small and bfloat16 and (32 or 256) and not loop and not compiled and not one_length"
  local compiled="bfloat16 and (small and 32 or small and 256 or base and 256) and compiled and not one_length"
  local patch="not none" captured="not host" norm="bfloat16 and 50432" pool="bfloat16"
  if [ $tiny = 1 ]; then
    attention="forward and 50 and float32 and bucketed" vit="small and float32 and bucketed and not one_length"
    captured="small and 1 and captured and not host" linear="bench_forward and float32 and gelu and not compiled"
    norm="bench_forward and 2920-384 and float32" pool="bench_forward and avg and 384 and float32"
    patch="photographs and planes and float32" compiled="$vit" rounds=(--rounds 3) few=(--tiny) smoke=(pool.reference)
  fi
  libraries 40
  # A kernel that is wrong, hangs or crashes is switched off by name, and the rest is measured.
  step smoke 40 "$PYTHON" benchmarks/gpu_smoke.py --each --switch-off "$WORK/disable" "${smoke[@]}"
  [ ! -s "$WORK/disable" ] || export REVIT_DISABLE="${REVIT_DISABLE:+$REVIT_DISABLE,}$(cat "$WORK/disable")"
  step ceilings 10 "$PYTHON" benchmarks/gpu_report.py "$WORK" --ceilings
  step forward 30 "$PYTHON" benchmarks/gpu_forward.py "$WORK/forward.json" "${few[@]}"
  bench bench_attention 75 bench_attention -k "$attention" "${rounds[@]}"
  bench bench_vit 45 bench_vit -k "$vit" "${rounds[@]}"
  bench bench_captured 20 bench_captured -k "$captured" "${rounds[@]}"
  bench bench_layer_norm 20 bench_layer_norm -k "$norm" "${rounds[@]}"
  bench bench_linear 20 bench_linear -k "$linear" "${rounds[@]}"
  bench bench_patch_embed 15 bench_patch_embed -k "$patch" "${rounds[@]}"
  bench bench_pool 10 bench_pool -k "$pool" "${rounds[@]}"
  bench bench_pos_embed 10 bench_pos_embed "${rounds[@]}"
  if tool ncu ncu; then
    local metrics=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
    metrics+=,sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread
    step ncu 30 ncu --profile-from-start off --clock-control none --csv --page raw --metrics "$metrics" \
      --log-file "$WORK/ncu.csv" "$PYTHON" benchmarks/gpu_profile.py
  fi
  bench bench_vit_compiled 70 bench_vit -k "$compiled" "${rounds[@]}"
}

$call
[ $list = 1 ] && exit 0
"$PYTHON" benchmarks/gpu_report.py "$WORK" --output "$OUT/$call"
status=$?
tar -czf "$OUT/${call}_logs.tar.gz" -C "$OUT" "$call" && rm -rf "$WORK"
cat "$OUT/$call.md"
exit $status
