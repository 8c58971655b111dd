#!/usr/bin/env bash
# Run all tests and measurements that need a GPU, in under ten minutes: benchmarks/gpu_pass.sh --help
# $PYTHON is the interpreter (default python3). Nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu_pass "$@"
