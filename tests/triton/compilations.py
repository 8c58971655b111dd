"""Count what a run compiles when only the number of rows changes, without a GPU and a compiler.

    python tests/triton/compilations.py

Triton's launcher is asked for kernels as for sm_90, with compilation replaced by a counter. The
script prints one line of JSON: kernel -> number of compilations. It must run in its own process,
because Triton's interpreter has no launcher.
"""

from __future__ import annotations

import collections
import importlib
import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget

ROWS = (
    100,
    101,
    112,
    128,
    255,
    264,
    265,
    448,
    1000,
    1023,
    1024,
    1025,
    2048,
    4095,
    4096,
    8192,
    10000,
)


class _Driver:
    """The parts of a driver that the launcher uses."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class _Compiled:
    """A compiled kernel that does nothing."""

    function = None
    packed_metadata = None

    def launch_metadata(self, *args):
        return None

    def run(self, *args):
        return None

    def result(self):
        return self


def main() -> None:
    counts: collections.Counter[str] = collections.Counter()

    def compile_(source, *args, **kwargs):
        counts[source.fn.__name__] += 1
        return _Compiled()

    triton.runtime.driver.set_active(_Driver())
    triton.compiler.compile = compile_
    launch = importlib.import_module("reft_kernels.triton.launch")
    launch._current_device = lambda: -1  # the device index of CPU tensors
    launch._current_stream = lambda device: 0
    backward = importlib.import_module("reft_kernels.triton.edit_backward")
    red = importlib.import_module("reft_kernels.triton.red")
    results = {}
    for selected in (True, False):
        for rank in (1, 8):
            counts.clear()
            for n in ROWS:
                _edit(backward, n, 64, rank, selected)
                _red(red, n, 64, selected)
            results[f"{'selected' if selected else 'all'}, r = {rank}"] = dict(counts)
    print(json.dumps(results))


def _rows(n, selected):
    return torch.arange(n, dtype=torch.int32) if selected else None


def _edit(module, n, d, rank, selected):
    grad = torch.empty(n, d, dtype=torch.bfloat16)
    u = torch.empty(n, rank)
    weights = (torch.empty(rank, d), torch.empty(rank, d))
    rows = _rows(n, selected)
    module.edit_backward(
        grad, grad, grad, u, u[:0], rows, None, *weights, None, True, "linear", True
    )


def _red(module, n, d, selected):
    grad = torch.empty(n, d, dtype=torch.bfloat16)
    module.red_backward(grad, grad, grad, _rows(n, selected), None, torch.empty(d), True)


if __name__ == "__main__":
    main()
