"""The demo's one table, as rows of text: for the terminal and for the report."""

from __future__ import annotations

from reft_train.demo.datasets import Dataset
from reft_train.demo.results import Result, StepTimes
from reft_train.demo.settings import Settings
from reft_train.demo.variants import TITLES

HEADER = (
    "",
    "trainable: edits",
    "head",
    "held-out accuracy",
    "step / frozen",
    "training",
    "peak memory",
)


def rows(results: list[Result], times: StepTimes, dataset: Dataset) -> list[tuple[str, ...]]:
    """One row for each variant, after the accuracy that needs no model."""
    table = [("most frequent label", "0", "0", f"{dataset.majority_accuracy:.1%}", "-", "-", "-")]
    for result in results:
        memory = result.memory
        table.append(
            (
                TITLES[result.name],
                f"{result.edit_count:,}",
                f"{result.head_count:,}",
                f"{result.accuracy:.1%}",
                f"{times.ratios[result.name]:.2f}",
                f"{result.seconds:.0f} s",
                f"{memory.peak:,.0f} MiB (+{max(0.0, memory.peak - memory.before):,.0f})",
            )
        )
    return table


def notes(results: list[Result], times: StepTimes, settings: Settings) -> list[str]:
    """What the columns mean: how each was measured."""
    return [
        "step / frozen: a training step (forward, backward, optimizer) over the frozen model's "
        "own forward and "
        f"input-gradient backward with the same head ({times.reference * 1e3:.0f} ms); medians of "
        f"{times.rounds} "
        f"interleaved rounds on {settings.device}, {settings.threads} CPU threads. With no edit "
        "no gradient enters the "
        "encoder; with them it stops at the first edited layer.",
        f"peak memory: {results[0].memory.method}; in brackets, what training added to the loaded "
        "model.",
    ]


def render(table: list[tuple[str, ...]]) -> str:
    """The table as aligned text, first column to the left, the others to the right."""
    lines = [HEADER, *table]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]

    def show(line: tuple[str, ...]) -> str:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        return "  ".join([line[0].ljust(widths[0]), *cells])

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([show(HEADER), rule, *map(show, table)])
