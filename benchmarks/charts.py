"""Line charts and bar charts of the benchmark figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks.plot_data import Lines, Point, bar_labels
from benchmarks.plot_style import FLOORS, MARKERS, colour, family, order
from benchmarks.rows import Measurement

MOST_GROUPS = 5  # groups of bars per row
LOG_FROM = 30  # ratio of largest to smallest value above which an axis is logarithmic
BarGroup = tuple[str, str]  # shape and dtype


def _plain(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _draw_lines(axes: Axes, lines: Lines) -> None:
    for provider, points in lines.items():
        x, y, low, high = zip(*points, strict=True)
        floor = provider in FLOORS
        look = {
            "marker": MARKERS.get(family(provider), "v"),
            "zorder": 3 if family(provider) == "reft_kernels" else 2,
        }
        if floor:
            look = {"marker": "." if len(x) == 1 else "", "zorder": 4, "linestyle": "--"}
        axes.plot(x, y, color=colour(provider), label=provider, **look)
        axes.fill_between(x, low, high, color=colour(provider), alpha=0.13, linewidth=0)
    axes.set_xscale("log", base=2)
    ticks = sorted({point[0] for points in lines.values() for point in points})
    axes.set_xticks(ticks)
    if len(ticks) > 5:
        axes.tick_params(axis="x", labelsize=8.5, labelrotation=35)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))


def _scale_y(axes: Axes, values: Sequence[float], log: bool) -> None:
    if not log:
        axes.set_ylim(0, 1.08 * max(values))
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter(
        NullFormatter() if max(values) > 10 * min(values) else FuncFormatter(_plain)
    )


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = order(handles)
    lines = -(-len(names) // min(4, int(figure.get_figwidth() // 2.3)))
    columns = -(-len(names) // lines)
    figure.legend(
        [handles[name] for name in names], names, loc="outside lower center", ncols=columns
    )


def line_chart(
    title: str,
    panels: list[list[tuple[str, str, str, Lines]]],
    log: bool = False,
    one: bool = False,
) -> Figure | None:
    """Draw a grid of line charts that share a y axis.

    Args:
        title: Title of the figure.
        panels: Title, x label, y label and lines of each panel, by row and column.
        log: Use a logarithmic y axis. It is used in any case for values over a large range.
        one: Draw a line at y = 1.

    Returns:
        The figure, or None if all panels are empty.
    """
    every = [
        point
        for line in panels
        for *_, lines in line
        for points in lines.values()
        for point in points
    ]
    if not every:
        return None
    figure = Figure(figsize=(4.6 * len(panels[0]), 3.1 * len(panels) + 1), layout="constrained")
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(len(panels), len(panels[0]), squeeze=False, sharey=True)
    values = [value for _, *ys in every for value in ys] + [1] * one
    for line, places in zip(panels, grid, strict=True):
        for k, ((head, x, y, lines), axes) in enumerate(zip(line, places, strict=True)):
            axes.set(title=head, xlabel=x, ylabel="" if k else y)
            if lines:
                _draw_lines(axes, lines)
            else:
                axes.text(
                    0.5,
                    0.5,
                    "not measured",
                    ha="center",
                    va="center",
                    transform=axes.transAxes,
                    color="#777777",
                )
                axes.set(xticks=[])
            if one:
                axes.axhline(1, color="#555555", linewidth=0.8, linestyle=":", zorder=1)
    _scale_y(grid[0, 0], values, log or max(values) > LOG_FROM * min(values))
    _legend(figure, grid.flat)
    return figure


def bar_chart(
    title: str,
    y_label: str,
    rows: Sequence[Measurement],
    value: Callable[[Measurement], Point | None],
    one: bool,
) -> Figure | None:
    """Draw a group of bars for each shape, with one bar for each provider.

    A provider without a value has its note in place of the bar.

    Returns:
        The figure, or None if there is no value.
    """
    providers, labels = order(row.provider for row in rows), bar_labels(rows)
    drawn = {(row.shape, row.dtype, row.provider): value(row) for row in rows}
    if not any(drawn.values()):
        return None
    providers = [name for name in providers if any(drawn.get((*place, name)) for place in labels)]
    places = list(labels)
    lines = [places[k : k + MOST_GROUPS] for k in range(0, len(places), MOST_GROUPS)]
    groups = len(lines[0])
    figure = Figure(
        figsize=(max(6.5, 1.6 + 0.36 * groups * (len(providers) + 1)), 3.6 * len(lines) + 1),
        layout="constrained",
    )
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(len(lines), 1, squeeze=False, sharey=True)[:, 0]
    notes = {(row.shape, row.dtype, row.provider): row.note.split(":")[0] for row in rows}
    for axes, line in zip(panels, lines, strict=True):
        _draw_bars(axes, line, providers, drawn, notes)
        axes.set_xticks(range(len(line)), [labels[place] for place in line], fontsize=8.5)
        axes.set(ylabel=y_label, xlim=(-0.55, groups - 0.45))
        axes.grid(axis="x", visible=False)
        axes.set_axisbelow(True)
        if one:
            axes.axhline(1, color="#555555", linewidth=0.9, linestyle=":")
    values = [point[1] for point in drawn.values() if point] + [1] * one
    tops = [max(point[1:]) for point in drawn.values() if point] + [1] * one
    _scale_y(panels[0], tops, max(values) > LOG_FROM * min(values))
    _legend(figure, panels)
    return figure


def _draw_bars(
    axes: Axes,
    places: Sequence[BarGroup],
    providers: Sequence[str],
    drawn: dict[tuple[str, str, str], Point | None],
    notes: dict[tuple[str, str, str], str],
) -> None:
    width = 0.84 / len(providers)
    for k, provider in enumerate(providers):
        for n, place in enumerate(places):
            x, point = n - 0.42 + (k + 0.5) * width, drawn.get((*place, provider))
            if point is None:
                # the table lists packages that are not installed
                note = notes.get((*place, provider), "").replace("absent", "")
                axes.text(
                    x,
                    0.015,
                    note,
                    rotation=90,
                    ha="center",
                    va="bottom",
                    fontsize=8,
                    color=colour(provider),
                    transform=axes.get_xaxis_transform(),
                )
                continue
            _, y, low, high = point
            errors = [[max(y - low, 0)], [max(high - y, 0)]] if high > low else None
            axes.bar(
                x,
                y,
                0.92 * width,
                color=colour(provider),
                label=provider,
                yerr=errors,
                ecolor="#333333",
            )
            axes.annotate(
                _plain(y),
                (x, max(y, high)),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
