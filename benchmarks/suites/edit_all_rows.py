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

import torch
from torch import Tensor

import reft_kernels
from benchmarks import edits, third_party
from benchmarks.harness import sets_for
from benchmarks.protocol import Call, Case, Provider, RunSettings

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


def cases(settings: RunSettings) -> Iterator[Case]:
    """Yield every shape in every mode."""
    base = BASE[settings.device]
    dtypes = DTYPES[settings.device]
    for dtype in dtypes[:1] if settings.quick else dtypes:
        for rows, d, r in shapes(settings):
            torch.manual_seed(0)
            torch.compiler.reset()
            sets = sets_for(2 * rows * d * dtype.itemsize, settings.device)
            problems = edits.draw(rows, d, r, dtype, settings.device, sets)
            central = settings.quick or rows == base[0] and r in (8, 32)
            # compilation takes seconds per shape, and a GPU pass has only ten minutes
            compiled = (
                torch.compile(edits.eager_folded, dynamic=False)
                if central or settings.device == "cpu"
                else None
            )
            slow = functools.cache(
                lambda problems=problems: third_party.pyreft_intervention(
                    problems[0].weights, problems[0].hidden.dtype
                )
            )
            for mode in ("forward", "backward", "both"):
                case = _case(problems, mode, settings.device, compiled)
                # pyreft factors d x d matrices, which takes long for larger d
                if settings.quick or (rows, r) == (base[0], base[2]) and d <= base[1]:
                    case.providers["pyreft"] = third_party.pyreft_edit(problems, mode, slow)
                yield case
            if central and d in (base[1], shapes(settings)[0][1]):
                yield _inside(problems[0], settings.device)


def _case(
    problems: list[edits.Problem], mode: str, device: str, compiled: edits.EditFunction | None
) -> Case:
    rows, d = problems[0].hidden.shape
    r, dtype = problems[0].weights[0].shape[0], problems[0].hidden.dtype
    gate = edits.EditGate(problems[0], backward=mode != "forward")
    providers = {
        name: edits.provider(reft_kernels.loreft, problems, mode, gate, backend)
        for name, backend in edits.backends(device).items()
    }
    providers["eager, folded"] = edits.provider(edits.eager_folded, problems, mode, gate)
    providers["eager, unfolded"] = edits.provider(edits.eager_unfolded, problems, mode, gate)
    if compiled:
        providers["torch.compile, folded"] = edits.provider(
            compiled, problems, mode, gate, countable=False
        )
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


def _inside(problem: edits.Problem, device: str) -> Case:
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
