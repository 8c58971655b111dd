"""Series and labels of the benchmark figures, from the rows of one device."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from benchmarks.plot_style import order
from benchmarks.rows import Measurement

SWITCHES = ("checkpointing", "compiled")  # in the shape of a training step where enabled
Point = tuple[float, float, float, float]  # x, y, and the y of p20 and of p80
Lines = dict[str, list[Point]]


def base(rows: Iterable[Measurement]) -> dict[str, str]:
    """Return the most frequent value of each name in the shapes.

    In suites that vary one dimension at a time, these values are the centre.
    """
    counts: dict[str, Counter[str]] = {}
    for shape in {row.shape: row.dimensions for row in rows}.values():
        for name, value in shape.items():
            counts.setdefault(name, Counter())[value] += 1
    return {name: count.most_common(1)[0][0] for name, count in counts.items()}


def along(
    rows: Sequence[Measurement], name: str, y: Callable[[Measurement, float], float | None]
) -> Lines:
    """Return a line for each provider along one dimension of the shape.

    Args:
        rows: Rows to draw.
        name: Dimension on the x axis. The other dimensions have their base value.
        y: Returns the y value for a row and a time in milliseconds. It is called with the median,
            the 20th and the 80th percentile.
    """
    centre = base(rows)
    centre.pop(name, None)
    lines: Lines = {}
    for row in rows:
        shape = row.dimensions
        if not row.median_ms or name not in shape or {**shape, **centre} != shape:
            continue
        values = [
            y(row, row.median_ms if t is None else t)
            for t in (row.median_ms, row.p20_ms, row.p80_ms)
        ]
        if None not in values:
            lines.setdefault(row.provider, []).append((float(shape[name]), *values))
    return {name: sorted(lines[name]) for name in order(lines)}


def fixed_dimensions(rows: Sequence[Measurement], *varied: str) -> str:
    """Return the base value of each dimension that is not varied, as text."""
    centre = base(rows)
    return ", ".join(f"{name} = {value}" for name, value in centre.items() if name not in varied)


def select(rows: Iterable[Measurement], suite: str, *modes: str) -> list[Measurement]:
    """Return the rows of a suite in some of its modes."""
    return [row for row in rows if row.suite == suite and row.mode in modes]


def dtypes(rows: Iterable[Measurement]) -> list[str]:
    """Return the dtypes of the rows, float32 first."""
    return sorted({row.dtype for row in rows}, key=lambda name: (name != "float32", name))


def speed_over(
    rows: Sequence[Measurement], baseline: str
) -> Callable[[Measurement, float], float | None]:
    """Return a function that gives a row's speed relative to a baseline in the same case.

    The function takes a row and a time in milliseconds. It uses the paired ratio of rows that were
    measured against that baseline, else the baseline's median. Where the baseline has no time for
    several layers, its time for one layer is multiplied.
    """
    times = {
        row.key[:-1]: row.median_ms for row in rows if row.provider == baseline and row.median_ms
    }

    def faster(row: Measurement, milliseconds: float) -> float | None:
        if row.baseline == baseline and row.ratio:
            return row.median_ms / milliseconds / row.ratio
        time = times.get(row.key[:-1])
        layers = row.dimensions.get("layers")
        if time is None and layers:
            one = row.shape.replace(f"layers={layers}", "layers=1")
            single = times.get((*row.key[:4], one, row.mode))
            time = single and single * int(layers)
        return time / milliseconds if time else None

    return faster


def _size(row: Measurement) -> tuple[float, ...]:
    """Return a sort key: width squared times layers of the model, then tokens."""
    shape = row.dimensions
    numbers = [int(n) for n in re.findall(r"\d+", shape.get("model", ""))]
    weights = numbers[-2] ** 2 * numbers[-1] if len(numbers) > 1 else sum(numbers)
    return weights, int(shape.get("batch", 1)) * int(shape.get("T", 1))


def bar_labels(rows: Sequence[Measurement]) -> dict[tuple[str, str], str]:
    """Return a label for each shape and dtype: the model, and the dimensions that vary."""
    shapes = [row.dimensions for row in rows]
    varied = {
        name for shape in shapes for name in shape if len({other.get(name) for other in shapes}) > 1
    }
    several_dtypes = len(dtypes(rows)) > 1
    labels = {}
    for row in sorted(rows, key=_size):
        shape = row.dimensions
        parts = [shape.get("model", "")]
        if varied & {"batch", "T"}:
            parts.append(f"{shape.get('batch')} x {shape.get('T')}")
        parts += [
            f"{k} = {v}"
            for k, v in shape.items()
            if k in varied and k in ("positions", "r", "layers", "d", "lengths")
        ]
        parts += [name for name in SWITCHES if shape.get(name) not in (None, "0")]
        labels[row.shape, row.dtype] = "\n".join(parts + [row.dtype] * several_dtypes)
    return labels
