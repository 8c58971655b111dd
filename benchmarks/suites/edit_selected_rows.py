"""Suite 2: cost of a LoReFT edit of f1+l1 to f16+l16 of each prompt, against the sequence length.

The hidden state is [batch * T, d]. A provider edits the selected rows and returns a hidden state
whose other rows are unchanged. "the rows alone" is the same edit by reft_kernels of a hidden
state that holds only the selected rows, as a lower bound. On a GPU the backward of the edit is
measured, too (:mod:`benchmarks.suites.selected_backward`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import reft_kernels
from benchmarks import edits
from benchmarks.harness import sets_for
from benchmarks.protocol import AccuracyCheck, Call, Case, CaseSpec, Provider, RunSettings
from benchmarks.suites import selected_backward
from reft_kernels import positions

TITLE = "Edit of selected rows"
ABOUT = "in-place edit of f1+l1 to f16+l16 of each prompt, at several sequence lengths"
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (128, 512, 2048, 8192)
BATCHES = (1, 8, 64)
COUNTS = (1, 7, 16)
ALONE = "the rows alone"
BASE = {"cpu": (8, 512, 7), "cuda": (32, 512, 7)}
WIDTH, RANK = 4096, 8


def shapes(settings: RunSettings) -> list[tuple[int, int, int]]:
    """Return (batch, T, k of fk+lk) of each case, varied one at a time around the base shape."""
    if settings.quick:
        return [(2, 64, 2)]
    batch, length, count = BASE[settings.device]
    varied = [
        (batch, length, count),
        *((batch, t, count) for t in LENGTHS),
        *((n, length, count) for n in BATCHES),
    ]
    return list(dict.fromkeys([*varied, *((batch, length, k) for k in COUNTS)]))


def _gathered(h: Tensor, R: Tensor, W: Tensor, b: Tensor, rows: Tensor) -> Tensor:
    """Clone, gather, edit and scatter, as in a hook that must not change its input."""
    out = h.clone()
    out[rows] = edits.eager_unfolded(h[rows], R, W, b)
    return out


def _gathered_in_place(h: Tensor, R: Tensor, W: Tensor, b: Tensor, rows: Tensor) -> Tensor:
    """Gather, edit with the folded formula and scatter into the same tensor."""
    return h.index_copy_(0, rows, edits.eager_folded(h.index_select(0, rows), R, W, b))


def specs(settings: RunSettings) -> Iterator[CaseSpec]:
    """Yield every batch size, length and number of positions."""
    device = settings.device
    d, rank = (128, 4) if settings.quick else (WIDTH, RANK)
    for dtype in DTYPES[:1] if settings.quick else DTYPES:
        for batch, length, count in shapes(settings):
            inputs = _Inputs(batch, length, count, d, rank, dtype, device)
            shape = {"batch": batch, "T": length, "positions": inputs.spec, "d": d, "r": rank}
            yield CaseSpec("forward", shape, dtype, functools.partial(_forward, inputs, shape))
            if device == "cuda" or settings.quick:
                build = functools.partial(selected_backward.case, inputs, shape)
                yield CaseSpec("backward", shape, dtype, build)


@dataclass(frozen=True)
class _Inputs:
    """A shape, whose input sets are drawn when its first case is built."""

    batch: int
    length: int
    count: int
    d: int
    rank: int
    dtype: torch.dtype
    device: str

    @property
    def spec(self) -> str:
        """The positions of each sequence."""
        return f"f{self.count}+l{self.count}"

    def rows(self) -> Tensor:
        """Return the selected rows, int32."""
        lengths = [self.length] * self.batch
        return positions.resolve(self.spec, lengths, self.length, device=self.device)

    def problems(self, sets: int | None = None) -> list[edits.Problem]:
        """Return the input sets, by default enough to exceed the cache."""
        if sets is not None:
            return _drawn(self, sets)
        held = 2 * self.batch * self.length * self.d * self.dtype.itemsize
        if self.device == "cuda":
            # an edit in place touches the selected rows alone
            sets = sets_for(
                2 * self.batch * self.count * self.d * self.dtype.itemsize, "cuda", held
            )
        else:
            sets = min(8, sets_for(held // 2, self.device))
        return _drawn(self, sets)


@functools.lru_cache(maxsize=1)
def _drawn(inputs: _Inputs, sets: int) -> list[edits.Problem]:
    torch.manual_seed(0)
    torch.compiler.reset()
    rows = inputs.batch * inputs.length
    return edits.draw(rows, inputs.d, inputs.rank, inputs.dtype, inputs.device, sets)


def one_call(
    mode: str,
    batch: int,
    length: int,
    count: int,
    d: int,
    rank: int,
    dtype: torch.dtype,
    device: str,
) -> Call:
    """Return one call of reft_kernels on one input set, for a profiler."""
    inputs = _Inputs(batch, length, count, d, rank, dtype, device)
    build = {"forward": _forward, "backward": selected_backward.case}[mode]
    return build(inputs, {}, sets=1).providers["reft_kernels"].prepare(0)


def _forward(inputs: _Inputs, shape: dict[str, object], sets: int | None = None) -> Case:
    problems, rows, device = inputs.problems(sets), inputs.rows(), inputs.device
    weights, wide = problems[0].weights, rows.long()
    d, dtype = problems[0].hidden.shape[1], problems[0].hidden.dtype
    alone = [problem.hidden[wide] for problem in problems]
    gate = edits.EditGate(edits.Problem(alone[0].clone(), torch.empty(0), weights), backward=False)

    def check(edit: edits.EditFunction) -> AccuracyCheck:
        # earlier calls have edited the hidden state in place
        hidden = problems[0].hidden.index_copy(0, wide, gate.problem.hidden)
        out = edit(hidden.clone(), *weights)
        rest = torch.ones(hidden.shape[0], dtype=torch.bool, device=device).index_fill(
            0, wide, False
        )
        if not torch.equal(out[rest], hidden[rest]):
            raise RuntimeError("a row that is not selected was changed")
        return gate(lambda *_: out[wide])

    def provider(
        edit: edits.EditFunction, hidden: list[Tensor], backend: str | None = None, **call: bool
    ) -> Provider:
        def prepare(k: int) -> Call:
            def run(_: object) -> Tensor:
                with torch.no_grad():
                    return edit(hidden[k], *problems[k].weights)

            return edits.force_backend(backend, Call(run, **call), hidden[k])

        checked = hidden is not alone
        return Provider(
            prepare,
            check=(lambda: edits.check_with_backend(backend, check, edit)) if checked else None,
        )

    all_hidden = [problem.hidden for problem in problems]
    inplace = functools.partial(reft_kernels.loreft, inplace=True)
    providers = {ALONE: provider(inplace, alone)}
    for name, backend in edits.backends(device).items():
        providers[name] = provider(functools.partial(inplace, rows=rows), all_hidden, backend)
    compiled = torch.compile(_gathered_in_place, dynamic=False)
    providers["eager, clone and scatter"] = provider(
        functools.partial(_gathered, rows=wide), all_hidden
    )
    providers["eager, in place"] = provider(
        functools.partial(_gathered_in_place, rows=wide), all_hidden
    )
    providers["torch.compile, in place"] = provider(
        functools.partial(compiled, rows=wide), all_hidden, countable=False
    )
    moved = edits.least_bytes(rows.numel(), d, weights[0].shape[0], dtype, "forward")
    return Case(
        "edit_selected_rows", "forward", shape, dtype, providers, ALONE, len(problems), moved, alone
    )
