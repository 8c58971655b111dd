#!/usr/bin/env bash
# Run all tests and benchmarks that need a GPU, in under ten minutes. Nothing is installed.
#   benchmarks/gpu_pass.sh [--resume] [env] [build] [tests] [kernels] [model] [profile] [sanitize] [tuning]
# Parts run in this order, by default all of them. --resume skips parts that an earlier pass with the same $OUT completed.
# Output is written to $OUT (default benchmarks/results/gpu_pass). Without a GPU, parts that need one are listed as absent.
# Each part has a time limit and is stopped when it exceeds it. LIMIT_<part>=SECONDS sets another limit, e.g. LIMIT_tests=600.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-benchmarks/results/gpu_pass}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT"
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
all=(env build tests kernels model profile sanitize tuning)
resume=0
parts=()
for argument in "$@"; do
  if [ "$argument" = --resume ]; then resume=1
  elif [[ " ${all[*]} " == *" $argument "* ]]; then parts+=("$argument")
  else echo "gpu_pass.sh: got '$argument', expected --resume, ${all[*]}" >&2; exit 2; fi
done
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")
if ! "$PYTHON" -c 'import torch' 2>/dev/null; then
  echo "gpu_pass.sh: $PYTHON cannot import torch; set PYTHON to another interpreter" >&2
  exit 2
fi
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then gpu=1; else gpu=0; fi
LIMIT_env=20 LIMIT_build=60
: "${LIMIT_tests:=200}" "${LIMIT_kernels:=110}" "${LIMIT_model:=90}" "${LIMIT_profile:=30}" "${LIMIT_sanitize:=50}" "${LIMIT_tuning:=60}"
failed=0
[ $resume = 1 ] || rm -f "$OUT"/*.done "$OUT/left_out.txt"

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

absent() { echo "$part: absent ($1)" | tee -a "$OUT/left_out.txt"; }

run() { # usage: run LOG COMMAND...; runs COMMAND within the remaining time of the part
  local log=$1 name="LIMIT_$part" left
  shift
  left=$((${!name} - SECONDS + began))
  if [ $left -le 0 ]; then
    echo "$part: $log left out, the part's limit of ${!name} s is reached" | tee -a "$OUT/left_out.txt"
    whole=0
    return
  fi
  echo "== $log (at most $left s)"
  timeout --kill-after 5 $left "$@" 2>&1 | tee "$OUT/$log.log"
  local status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] && return
  whole=0
  if [ "$status" -eq 124 ]; then echo "$part: $log stopped after $left s" | tee -a "$OUT/left_out.txt"
  else echo "$part: $log ended with status $status" | tee -a "$OUT/left_out.txt"; failed=1; fi
}

run_suite() { run "$1" "$PYTHON" -m benchmarks.run --only "$1" --device cuda --csv "$OUT/$1.csv"; }

part_env() {
  run env "$PYTHON" -m reft_kernels.env
  if [ $gpu = 1 ]; then run nvidia-smi nvidia-smi; else absent "no GPU; versions only"; fi
}

part_build() {
  if ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then absent "no nvcc"
  elif ! has ninja && ! command -v ninja >/dev/null; then absent "no ninja"
  else
    run build_cpu "$PYTHON" csrc/build.py
    run build_cuda "$PYTHON" csrc/build.py --cuda
  fi
}

part_tests() {
  if [ $gpu = 0 ]; then absent "no GPU"
  elif ! has pytest || ! has hypothesis; then absent "pytest or hypothesis is not installed"
  else run tests "$PYTHON" -m pytest -m gpu -p no:cacheprovider; fi
}

part_kernels() {
  if [ $gpu = 0 ]; then absent "no GPU"
  else for suite in edit_selected_rows r_build host_cost edit_all_rows cold_start; do run_suite $suite; done; fi
}

part_model() {
  if [ $gpu = 0 ]; then absent "no GPU"
  elif ! has transformers || ! has peft; then absent "transformers or peft is not installed"
  else for suite in training_step generation trainer_step; do run_suite $suite; done; fi
}

part_profile() {
  local ncu metrics
  ncu=$(command -v ncu || echo /usr/local/cuda/bin/ncu)
  metrics=dram__bytes_read.sum,dram__bytes_write.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,gpu__time_duration.sum
  metrics+=,launch__registers_per_thread,launch__grid_size,sm__warps_active.avg.pct_of_peak_sustained_active
  if [ $gpu = 0 ]; then absent "no GPU"
  elif [ ! -x "$ncu" ]; then absent "ncu is not installed"
  else run profile "$ncu" --clock-control none --nvtx --csv --metrics "$metrics" "$PYTHON" -m benchmarks.profiled; fi
}

part_sanitize() {
  local sanitizer chosen="strides or unselected or skipped or nothing or zero_X or without_signs"
  sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
  if [ $gpu = 0 ]; then absent "no GPU"
  elif [ ! -x "$sanitizer" ]; then absent "compute-sanitizer is not installed"
  elif ! has pytest || ! has hypothesis; then absent "pytest or hypothesis is not installed"
  else
    for tool in racecheck memcheck initcheck synccheck; do
      run $tool "$sanitizer" --tool $tool --error-exitcode 9 --launch-timeout 60 \
        "$PYTHON" -m pytest -m gpu -p no:cacheprovider -x tests/cuda/test_cuda_kernels.py -k "$chosen"
    done
  fi
}

part_tuning() {
  if [ $gpu = 0 ]; then absent "no GPU"
  elif ! has triton; then absent "triton is not installed"
  else run tuning "$PYTHON" -m benchmarks.tuning --csv "$OUT/tuning.csv" --rounds 9; fi
}

for part in "${parts[@]}"; do
  if [ $resume = 1 ] && [ -e "$OUT/$part.done" ]; then
    echo "$part: done before"
    continue
  fi
  began=$SECONDS whole=1
  "part_$part"
  [ $whole = 0 ] || [ $gpu = 0 ] || touch "$OUT/$part.done"
done
echo "output: $OUT, $SECONDS s"
exit $failed
