"""Launch the main kernels once on cold inputs, to measure their memory traffic with a profiler.

    ncu --clock-control none --set none --metrics METRICS --csv python -m benchmarks.profiled

Each case is warmed up and then run inside an NVTX range that has its name.
"""

from __future__ import annotations

import sys

import torch

import reft_kernels
from benchmarks import edits
from benchmarks.protocol import Call

SHAPES = ((8192, 4096, 8), (8192, 4096, 32), (448, 4096, 8))
BUILDS = ((1, 4096, 8), (32, 4096, 8))


def _calls(device: str) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for rows, d, rank in SHAPES:
        problems = edits.draw(rows, d, rank, torch.bfloat16, device, 1)
        for mode in ("forward", "backward"):
            calls[f"edit {mode} rows={rows} d={d} r={rank} bfloat16"] = edits.provider(
                reft_kernels.loreft, problems, mode, None
            ).prepare(0)
    for layers, d, rank in BUILDS:
        X = (torch.randn(layers, d, rank, device=device) / d**0.5).requires_grad_()
        G = torch.randn(layers, rank, d, device=device)
        for name in ("householder", "cayley"):
            function = getattr(reft_kernels, name)
            calls[f"{name} layers={layers} d={d} r={rank}"] = Call(
                lambda _, f=function, X=X, G=G: torch.autograd.grad(f(X), X, G)
            )
    return calls


def main() -> int:
    """Run every case. Returns 2 without a GPU."""
    if not torch.cuda.is_available():
        print("benchmarks.profiled: needs a GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    evict = torch.empty(
        4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda"
    )
    for name, call in _calls("cuda").items():
        call.once()
        prepared = call.before()
        evict.random_()
        torch.cuda.synchronize()
        torch.cuda.nvtx.range_push(name)
        call.run(prepared)
        torch.cuda.synchronize()
        torch.cuda.nvtx.range_pop()
        print(name, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
