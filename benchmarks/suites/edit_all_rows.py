"""Suite 1: cost of a LoReFT edit of every row, forward and backward.

The minimum traffic is one read and one write of h forward, and reads of h and g and a write of dh
backward. ``torch.clone`` of h in the same rounds shows the machine's bandwidth. One dimension is
varied at a time around d = 4096, r = 8. Mode ``inside`` places the edit between two other
operations of a graph, where hidden state and gradient belong to the graph and are edited in
place. Its baseline is the same graph without an edit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import reft_kernels
from benchmarks import edits, third_party
from benchmarks.harness import sets_for
from benchmarks.protocol import Call, Case, CaseSpec, Provider, RunSettings

TITLE = "Edit of all rows"
ABOUT = "h + Rᵀ(Wh + b - Rh) on every row: bandwidth against rows, speed-up against d and r"
# in order of importance
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float32)}
ROWS = {"cpu": (256, 1024, 4096, 16384), "cuda": (256, 1024, 4096, 8192, 16384, 65536)}
WIDTHS = (768, 2048, 4096, 8192)
RANKS = (1, 4, 8, 16, 32, 64)
BASE = {"cpu": (4096, 4096, 8), "cuda": (8192, 4096, 8)}


def shapes(settings: RunSettings) -> list[tuple[int, int, int]]:
    """Return (rows, d, r) of each case, one dimension varied at a time around the base shape."""
    if settings.quick:
        return [(256, 128, 4)]
    rows, d, r = BASE[settings.device]
    varied = [
        (rows, d, r),
        *((n, d, r) for n in ROWS[settings.device]),
        *((rows, w, r) for w in WIDTHS),
    ]
    return list(dict.fromkeys([*varied, *((rows, d, rank) for rank in RANKS)]))


def specs(settings: RunSettings) -> Iterator[CaseSpec]:
    """Yield every shape in every mode."""
    base, device = BASE[settings.device], settings.device
    dtypes = DTYPES[device]
    for dtype in dtypes[:1] if settings.quick else dtypes:
        for rows, d, r in shapes(settings):
            shape = {"rows": rows, "d": d, "r": r}
            central = settings.quick or rows == base[0] and r in (8, 32)
            # compilation takes seconds per shape
            compiling = central or device == "cpu"
            # pyreft factors d x d matrices, which takes long for larger d
            with_pyreft = settings.quick or (rows, r) == (base[0], base[2]) and d <= base[1]
            inputs = _Inputs(rows, d, r, dtype, device, compiling, with_pyreft)
            for mode in ("forward", "backward", "both"):
                yield CaseSpec(mode, shape, dtype, functools.partial(_case, inputs, mode))
            if central and d in (base[1], shapes(settings)[0][1]):
                yield CaseSpec("inside", shape, dtype, functools.partial(_inside, inputs))


@dataclass(frozen=True)
class _Inputs:
    """A shape, whose input sets are drawn when its first case is built."""

    rows: int
    d: int
    r: int
    dtype: torch.dtype
    device: str
    compiling: bool
    with_pyreft: bool

    def problems(self, mode: str) -> list[edits.Problem]:
        """Return the input sets of a mode."""
        touched = edits.touched_bytes(self.rows, self.d, self.dtype, mode)
        held = 2 * self.rows * self.d * self.dtype.itemsize
        # on the CPU as many sets in each mode, all larger than the cache
        sets = sets_for(touched if self.device == "cuda" else held, self.device, held)
        return _drawn(self.rows, self.d, self.r, self.dtype, self.device, sets)


@functools.lru_cache(maxsize=1)
def _drawn(
    rows: int, d: int, r: int, dtype: torch.dtype, device: str, sets: int
) -> list[edits.Problem]:
    torch.manual_seed(0)
    torch.compiler.reset()
    return edits.draw(rows, d, r, dtype, device, sets)


def _case(inputs: _Inputs, mode: str) -> Case:
    problems = inputs.problems(mode)
    rows, d, r, dtype = inputs.rows, inputs.d, inputs.r, inputs.dtype
    gate = edits.EditGate(problems[0], backward=mode != "forward")
    providers = {
        name: edits.provider(reft_kernels.loreft, problems, mode, gate, backend)
        for name, backend in edits.backends(inputs.device).items()
    }
    providers["eager, folded"] = edits.provider(edits.eager_folded, problems, mode, gate)
    providers["eager, unfolded"] = edits.provider(edits.eager_unfolded, problems, mode, gate)
    if inputs.compiling:
        compiled = torch.compile(edits.eager_folded, dynamic=False)
        providers["torch.compile, folded"] = edits.provider(
            compiled, problems, mode, gate, countable=False
        )
    if inputs.with_pyreft:
        slow = functools.cache(
            lambda: third_party.pyreft_intervention(problems[0].weights, problems[0].hidden.dtype)
        )
        providers["pyreft"] = third_party.pyreft_edit(problems, mode, slow)
    return Case(
        "edit_all_rows",
        mode,
        {"rows": rows, "d": d, "r": r},
        dtype,
        providers,
        "eager, unfolded",
        len(problems),
        edits.least_bytes(rows, d, r, dtype, mode),
        [problem.hidden for problem in problems],
        7,
    )


def _inside(inputs: _Inputs) -> Case:
    problem = inputs.problems("both")[0]
    rows, d = problem.hidden.shape
    r, dtype = problem.weights[0].shape[0], problem.hidden.dtype

    def graph(edit: edits.EditFunction) -> edits.EditFunction:
        return lambda h, *weights: edit(h * 1.0, *weights) * 1.0

    def nothing(h: Tensor, *_: Tensor) -> Tensor:
        return h

    def alone(_: int) -> Call:
        leaf = problem.leaves()[0]
        return Call(lambda _: torch.autograd.grad(graph(nothing)(leaf), leaf, problem.grad))

    gate = edits.EditGate(problem, backward=True)
    inplace = graph(functools.partial(reft_kernels.loreft, inplace=True))
    compiled = torch.compile(graph(edits.eager_folded), dynamic=False)
    providers = {
        "no edit": Provider(alone),
        "reft_kernels": edits.provider(inplace, [problem], "both", gate),
    }
    providers["eager, folded"] = edits.provider(graph(edits.eager_folded), [problem], "both", gate)
    providers["eager, unfolded"] = edits.provider(
        graph(edits.eager_unfolded), [problem], "both", gate
    )
    providers["torch.compile, folded"] = edits.provider(
        compiled, [problem], "both", gate, countable=False
    )
    return Case(
        "edit_all_rows",
        "inside",
        {"rows": rows, "d": d, "r": r},
        dtype,
        providers,
        "no edit",
        rounds=7,
    )
