"""Launch the main kernels once on cold inputs, to measure their memory traffic with a profiler.

    ncu --clock-control none --nvtx --nvtx-include profiled --csv --metrics METRICS \\
        python -m benchmarks.profiled [--device cuda] [--quick] [--cases NAME ...]

Each case is warmed up and then run inside two NVTX ranges: ``profiled``, which limits the profiler
to the measured call, and one that has the name of the case. They are ranges of the process, with a
start and an end, because autograd launches the kernels of a backward pass from another thread. The
same region is marked by ``cudaProfilerStart`` and ``cudaProfilerStop`` for
``ncu --profile-from-start off``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator

import torch

import reft_kernels
from benchmarks import edits
from benchmarks.protocol import Call
from benchmarks.suites import edit_selected_rows

RANGE = "profiled"
# in order of importance
SHAPES = ((8192, 4096, 8), (65536, 4096, 8), (8192, 4096, 32))
SELECTED = (32, 512, 7)  # batch, length and k of fk+lk: 448 rows
BUILDS = ((32, 4096, 8), (1, 4096, 8))


def calls(device: str, quick: bool) -> dict[str, Callable[[], Call]]:
    """Return a function that draws the inputs of each case, by the name of the case."""
    made: dict[str, Callable[[], Call]] = {}
    dtype = torch.float32 if quick else torch.bfloat16
    batch, length, count = (2, 16, 2) if quick else SELECTED
    d, rank = (64, 4) if quick else (4096, 8)
    name = f"rows={2 * batch * count} of {batch * length} d={d} r={rank}"
    for mode in ("forward", "backward"):
        made[f"selected {mode} {name}"] = functools.partial(
            _selected, mode, (batch, length, count), d, rank, dtype, device
        )
    for rows, d, rank in ((64, 64, 4),) if quick else SHAPES:
        for mode in ("forward", "backward"):
            made[f"edit {mode} rows={rows} d={d} r={rank}"] = functools.partial(
                _edit, mode, rows, d, rank, dtype, device
            )
    for layers, d, rank in ((2, 64, 4),) if quick else BUILDS:
        for map_name in ("householder", "cayley"):
            made[f"{map_name} layers={layers} d={d} r={rank}"] = functools.partial(
                _build, map_name, layers, d, rank, device
            )
    return made


def _edit(mode: str, rows: int, d: int, rank: int, dtype: torch.dtype, device: str) -> Call:
    problems = edits.draw(rows, d, rank, dtype, device, 1)
    return edits.provider(reft_kernels.loreft, problems, mode, None).prepare(0)


def _selected(
    mode: str, shape: tuple[int, int, int], d: int, rank: int, dtype: torch.dtype, device: str
) -> Call:
    return edit_selected_rows.one_call(mode, *shape, d, rank, dtype, device)


def _build(name: str, layers: int, d: int, rank: int, device: str) -> Call:
    X = (torch.randn(layers, d, rank, device=device) / d**0.5).requires_grad_()
    G = torch.randn(layers, rank, d, device=device)
    function = getattr(reft_kernels, name)
    return Call(lambda _: torch.autograd.grad(function(X), X, G))


@contextlib.contextmanager
def _profiled(name: str, device: str) -> Iterator[None]:
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    ranges = [torch.cuda.nvtx.range_start(text) for text in (RANGE, name)]
    try:
        yield
        torch.cuda.synchronize()
    finally:
        for handle in reversed(ranges):
            torch.cuda.nvtx.range_end(handle)
        torch.cuda.profiler.stop()


def main(argv: list[str] | None = None) -> int:
    """Run every case. Returns 1 if a case failed, 2 without a GPU or for an unknown case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiled")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="use small shapes")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="cases to run")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.profiled: needs a GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    made, failed = calls(args.device, args.quick), False
    unknown = [name for name in args.cases or () if name not in made]
    if unknown:
        print(f"--cases: got {unknown[0]!r}, expected of: {'; '.join(made)}", file=sys.stderr)
        return 2
    evict = None
    if args.device == "cuda":
        size = 4 * torch.cuda.get_device_properties(0).L2_cache_size
        evict = torch.empty(size, dtype=torch.uint8, device="cuda")
    for name in args.cases or made:
        try:
            call = made[name]()
            call.once()
            with call.context():
                prepared = call.before()
                if evict is not None:
                    evict.random_()
                with _profiled(name, args.device):
                    call.run(prepared)
        except Exception as error:
            failed = True
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        else:
            print(name, flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
