#!/usr/bin/env bash
# Everything that needs a GPU, in one command: native build, environment, the gpu tests, the benchmarks, the sanitizers.
#   benchmarks/gpu_pass.sh [build] [env] [tests] [kernels] [model] [sanitize]        parts, all by default; output under $OUT
# Without a GPU it runs through and marks each part absent. It installs nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-benchmarks/results}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT"
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(build env tests kernels model sanitize)
failed=0

if ! "$PYTHON" -c 'import torch' 2>/dev/null; then
  echo "gpu_pass.sh: $PYTHON has no torch; name another by PYTHON=..." >&2
  exit 2
fi

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
    build)
      if ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then absent build "no nvcc"
      elif ! has ninja && ! command -v ninja >/dev/null; then absent build "no ninja"
      else run build_cuda "$PYTHON" csrc/build.py --cuda && run build_cpu "$PYTHON" csrc/build.py; fi
      ;;
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
    sanitize)
      sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
      if [ $gpu = 0 ]; then absent sanitize "no GPU"
      elif [ ! -x "$sanitizer" ]; then absent sanitize "compute-sanitizer is not installed"
      elif ! has pytest || ! has hypothesis; then absent sanitize "pytest or hypothesis is not installed"
      else
        for tool in memcheck racecheck initcheck synccheck; do
          run "$tool" timeout 120 "$sanitizer" --tool "$tool" --error-exitcode 9 --launch-timeout 60 \
            "$PYTHON" -m pytest -m gpu -p no:cacheprovider -x tests/cuda/test_cuda_kernels.py -k "strides or unselected or skipped or nothing or zero_X or without_signs"
        done
      fi
      ;;
    *)
      echo "unknown part '$part', expected build, env, tests, kernels, model or sanitize" >&2
      exit 2
      ;;
  esac
done
exit $failed
