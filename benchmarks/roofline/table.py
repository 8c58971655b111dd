"""The table of estimates, as text and as markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from benchmarks.roofline import compiling, launches, model, native_launches, tracing
from benchmarks.roofline.model import H200, Device, Estimate
from benchmarks.roofline.shapes import Question
from benchmarks.roofline.targets import Target

HEAD = (
    "operator",
    "shape",
    "backend",
    "kernel",
    "programs",
    "registers",
    "HBM MB",
    "ideal MB",
    "L2 MB",
    "weights MB",
    "instructions",
    "steps",
    "barriers",
    "bound by",
    "ESTIMATE us",
    "clone us",
    "of clone",
)
NOTE = (
    "ESTIMATES from the compiled code, not measurements. HBM and L2: bytes moved by the executed "
    "loads and stores; ideal: each tensor once; weights: the part of L2 that all programs read; "
    "instructions: warp instructions for each element; steps and barriers: of one program; of "
    "clone: the estimated time of a clone of the same rows (or of R) divided by the estimate."
)


@dataclasses.dataclass(frozen=True)
class Answer:
    """ESTIMATES of one call."""

    question: Question
    backend: str
    launches: tuple[Estimate, ...]
    clone: float

    @property
    def seconds(self) -> float:
        """Estimated time of all launches in s."""
        return sum(one.seconds for one in self.launches)

    @property
    def hbm_bytes(self) -> float:
        """Bytes that all launches move to and from HBM."""
        return sum(one.hbm_bytes for one in self.launches)


def answer(question: Question, target: Target, device: Device = H200) -> Answer:
    """Record, compile, execute and estimate the launches of one call of the Triton backend."""
    estimates = []
    for launch in launches.record(target, question.call):
        compiled = compiling.compile_launch(launch, target)
        estimates.append(
            model.estimate(
                launch,
                compiled,
                tracing.traces(launch, compiled),
                tracing.last_arrival(launch, compiled),
                device,
            )
        )
    clone = model.clone_seconds(question.clone_bytes, device)
    return Answer(question, "triton", tuple(estimates), clone)


def native_answer(question: Question, target: Target, device: Device = H200) -> Answer | None:
    """Record, compile, execute and estimate the launches of one call of the CUDA backend.

    Returns:
        None if the kernels of ``csrc/cuda`` do not serve the call.
    """
    try:
        recorded = native_launches.record(target, question.call, device)
    except native_launches.NotServed:
        return None
    estimates = []
    for launch in recorded:
        compiled = native_launches.compile_launch(launch, target)
        traces = native_launches.traces(launch, compiled)
        estimates.append(model.estimate(launch, compiled, traces, None, device))
    clone = model.clone_seconds(question.clone_bytes, device)
    return Answer(question, "cuda", tuple(estimates), clone)


def assumptions(target: Target, device: Device = H200) -> list[str]:
    """Return what the estimates assume, a line each."""
    return [
        f"code compiled for {target.name}; GPU: {device.name}, {device.processors} "
        f"multiprocessors, {device.clock / 1e9:.2f} GHz, {device.issue} warp instructions a clock "
        "each",
        f"HBM {device.hbm / 1e12:.1f} TB/s (copy), L2 {device.l2 / 1e12:.1f} TB/s and "
        f"{device.l2_size / 1e6:.0f} MB, {device.launch * 1e6:.0f} us a launch",
        f"clocks: {device.hbm_latency:.0f} for a load from HBM, {device.l2_latency:.0f} from L2, "
        f"{device.barrier:.0f} for a barrier, {device.spacing:.0f} between two instructions of a "
        "warp; no hits in L1",
        f"{device.exchange:.0f} clocks for a transfer between blocks of a cluster; clusters stay "
        f"within parts of {' + '.join(map(str, device.partitions))} multiprocessors",
        "cuda: launches of csrc/cuda as its host code makes them, nvcc's code; calls that it does "
        "not serve have no row",
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def lines(answers: Iterable[Answer]) -> list[tuple[str, ...]]:
    """Return the cells of the table: one line a launch, and a sum where there are several."""
    result = []
    for one in answers:
        question = one.question
        for number, estimate in enumerate(one.launches):
            alone = len(one.launches) == 1
            result.append(
                (
                    question.operator if number == 0 else "",
                    question.shape if number == 0 else "",
                    one.backend if number == 0 else "",
                    estimate.kernel.removesuffix("_kernel"),
                    f"{estimate.programs:,}",
                    str(estimate.registers),
                    _number(estimate.hbm_bytes / 1e6),
                    _number(question.ideal_bytes / 1e6) if alone else "",
                    _number(estimate.l2_bytes / 1e6),
                    _number(estimate.weight_bytes / 1e6),
                    f"{estimate.instructions / question.elements:.2f}",
                    str(estimate.iterations),
                    str(estimate.barriers),
                    estimate.limit,
                    f"{estimate.seconds * 1e6:.1f}",
                    f"{one.clone * 1e6:.1f}" if alone else "",
                    f"{one.clone / one.seconds:.0%}" if alone else "",
                )
            )
        if len(one.launches) > 1:
            result.append(_sum(one))
    return result


def _sum(one: Answer) -> tuple[str, ...]:
    question, parts = one.question, one.launches
    return (
        "",
        "",
        "",
        "both" if len(parts) == 2 else "all",
        "",
        "",
        _number(one.hbm_bytes / 1e6),
        _number(question.ideal_bytes / 1e6),
        _number(sum(p.l2_bytes for p in parts) / 1e6),
        _number(sum(p.weight_bytes for p in parts) / 1e6),
        f"{sum(p.instructions for p in parts) / question.elements:.2f}",
        "",
        "",
        "",
        f"{one.seconds * 1e6:.1f}",
        f"{one.clone * 1e6:.1f}",
        f"{one.clone / one.seconds:.0%}",
    )


def text(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 4) -> str:
    """Return a table in columns, of which the first ``left`` are left-aligned."""
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k < left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    )


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 4) -> str:
    """Return a table in markdown, of which the first ``left`` columns are left-aligned."""
    rule = ["---" if k < left else "---:" for k in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
