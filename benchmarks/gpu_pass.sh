#!/usr/bin/env bash
# Everything that needs a GPU, in one command: environment, the gpu tests, the benchmarks. Output under $OUT.
#   benchmarks/gpu_pass.sh [env] [tests] [kernels] [model]        parts, all by default
# Without a GPU it runs through and marks each part absent. It installs nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-benchmarks/results}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT"
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(env tests kernels model)
failed=0

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then gpu=1; else gpu=0; fi

absent() { echo "$1: absent ($2)" | tee -a "$OUT/left_out.txt"; }

run() { # name, command...
  local name=$1
  shift
  echo "== $name"
  "$@" 2>&1 | tee "$OUT/$name.log"
  local status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || { echo "$name: exit status $status" | tee -a "$OUT/left_out.txt"; failed=1; }
}

for part in "${parts[@]}"; do
  case $part in
    env)
      run env "$PYTHON" -m reft_kernels.env
      [ $gpu = 0 ] || run nvidia-smi nvidia-smi
      ;;
    tests)
      if [ $gpu = 0 ]; then absent tests "no GPU"
      elif ! has pytest || ! has hypothesis; then absent tests "pytest or hypothesis is not installed"
      else run tests "$PYTHON" -m pytest -m gpu -p no:cacheprovider; fi
      ;;
    kernels)
      if [ $gpu = 0 ]; then absent kernels "no GPU"
      else
        run r_build "$PYTHON" -m benchmarks.r_build --device cuda --csv "$OUT/r_build.csv"
        run edit "$PYTHON" -m benchmarks.edit --device cuda --csv "$OUT/edit.csv"
      fi
      ;;
    model)
      if [ $gpu = 0 ]; then absent model "no GPU"
      elif ! has transformers || ! has peft; then absent model "transformers or peft is not installed"
      else run training_step "$PYTHON" -m benchmarks.training_step --device cuda --csv "$OUT/training_step.csv"; fi
      ;;
    *)
      echo "unknown part '$part', expected env, tests, kernels or model" >&2
      exit 2
      ;;
  esac
done
exit $failed
