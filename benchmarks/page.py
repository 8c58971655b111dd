"""Write one self-contained HTML page of all raw rows.

    python -m benchmarks.page [RESULTS_DIR] [--out FILE.html]

The page has the environments, figures and complete tables of every device, and the cases where
reft_kernels is slower. The figures are also written to ``RESULTS_DIR/<device>/figures``.

The exit status is 0 when the page is written and 2 when the rows cannot be read.
"""

from __future__ import annotations

import argparse
import base64
import html
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from reft_train.files import write_text

from benchmarks import compare, plots, suites
from benchmarks.roofline import saved as estimates
from benchmarks.rows import RESULTS, Measurement

OUT = RESULTS / "page.html"
NO_GPU = "GPU: not measured"
_CSS = """
:root { color-scheme: light dark; --text: #1f2328; --faint: #656d76; --line: #d8dee4; --back: #fff; --own: #0b5fa514; }
@media (prefers-color-scheme: dark) {
  :root { --text: #dde3ea; --faint: #939ba5; --line: #343b44; --back: #14181d; --own: #4f9bd92b; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em; }
body { color: var(--text); background: var(--back); }
h1 { font-size: 1.6em; } h2 { margin-top: 2.2em; border-bottom: 1px solid var(--line); } h3 { margin-top: 1.8em; }
.wide { overflow-x: auto; } .faint, figcaption { color: var(--faint); font-size: .9em; }
table { border-collapse: collapse; font-size: .87em; font-variant-numeric: tabular-nums; margin: .6em 0; }
th, td { padding: .18em .7em; text-align: right; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--line); color: var(--faint); font-weight: 600; }
.left { text-align: left; } tbody tr.first td { border-top: 1px solid var(--line); } tr.own { background: var(--own); }
figure { display: inline-block; margin: .6em .8em .6em 0; max-width: 100%; vertical-align: top; }
img { max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 4px; }
.missing { color: #b35900; font-weight: 600; } nav a { margin-right: 1em; } summary { cursor: pointer; }
"""


def _text(value: object) -> str:
    return html.escape(str(value))


def _number(value: float | int | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _table(head: Sequence[str], lines: Iterable[tuple[str, Sequence[str]]], left: int) -> str:
    """Return a scrollable table.

    Args:
        head: Column titles.
        lines: CSS class and cells of each row.
        left: Number of left-aligned columns.
    """

    def cells(values: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=left' if k < left else ''}>{_text(value)}</{tag}>"
            for k, value in enumerate(values)
        )

    body = "\n".join(f'<tr class="{kind}">{cells(values, "td")}</tr>' for kind, values in lines)
    return (
        f'<div class="wide"><table><thead><tr>{cells(head, "th")}</tr></thead><tbody>\n{body}\n'
        "</tbody></table></div>"
    )


def _environment(rows: Sequence[Measurement]) -> str:
    """Return a table with a line per run: versions, commit, date, threads, allocator and suites."""
    runs: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        key = (
            row.when,
            row.commit,
            row.torch,
            row.triton,
            row.transformers,
            row.driver,
            str(row.threads),
            row.allocator,
        )
        runs.setdefault(key, []).append(row.suite)
    head = (
        "when",
        "commit",
        "torch",
        "triton",
        "transformers",
        "driver",
        "threads",
        "allocator",
        "suites",
        "rows",
    )
    lines = [
        ("", (*key, ", ".join(sorted(set(runs[key]))), str(len(runs[key])))) for key in sorted(runs)
    ]
    return _table(head, lines, len(head) - 1)


_HEAD = (
    "mode",
    "shape",
    "dtype",
    "allocator",
    "provider",
    "median ms",
    "p20-p80 ms",
    "ratio",
    "to",
    "of clone",
    "graph ms",
    "launches",
    "host us",
    "peak MiB",
    "error",
    "allowed",
    "rounds",
    "note",
)


def _cells(row: Measurement, first: bool) -> tuple[str, ...]:
    spread = (
        ""
        if row.median_ms is None
        else f"{row.p20_ms:.4g}-{row.p80_ms:.4g}"
        if row.p20_ms and row.p80_ms
        else ""
    )
    case = (row.mode, row.shape, row.dtype, row.allocator) if first else ("", "", "", "")
    errors = ("" if value is None else f"{value:.1e}" for value in (row.error, row.allowed))
    return (
        *case,
        row.provider,
        "" if row.median_ms is None else f"{row.median_ms:.4g}",
        spread,
        _number(row.ratio),
        row.baseline if row.ratio is not None else "",
        "" if row.clone_fraction is None else f"{row.clone_fraction:.0%}",
        "" if row.graph_ms is None else f"{row.graph_ms:.4g}",
        _number(row.launches),
        _number(row.host_us),
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.1f}",
        *errors,
        str(row.rounds),
        row.note,
    )


def _results(rows: Sequence[Measurement]) -> str:
    lines = []
    for case in compare.cases(rows):
        for k, row in enumerate(case):
            kinds = ["first"] * (k == 0) + ["own"] * compare.is_ours(row)
            lines.append((" ".join(kinds), _cells(row, k == 0)))
    return _table(_HEAD, lines, 5)


def _figure(plot: plots.Plot) -> str:
    if plot.path is None:
        return f'<p><span class="missing">not measured</span>: {_text(plot.title)}</p>'
    data = base64.b64encode(plot.path.read_bytes()).decode()
    image = f'<img alt="{_text(plot.title)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{_text(plot.caption)}</figcaption></figure>"


def _behind(rows: Sequence[Measurement]) -> str:
    losses = compare.behind(rows)
    if not losses:
        return "<p>reft_kernels is slower than another provider in no case measured here.</p>"
    head = (
        "suite",
        "mode",
        "shape",
        "dtype",
        "allocator",
        "reft_kernels",
        "ms",
        "faster provider",
        "ms",
        "times faster",
    )
    lines = []
    for loss in losses:
        own = loss.own
        for k, other in enumerate(loss.others):
            case = (
                (own.suite, own.mode, own.shape, own.dtype, own.allocator, own.provider)
                if k == 0
                else ("",) * 6
            )
            time = (
                ("" if k else own.note or "no time")
                if own.median_ms is None
                else ""
                if k
                else f"{own.median_ms:.4g}"
            )
            factor = "" if own.median_ms is None else _number(own.median_ms / other.median_ms)
            lines.append(
                (
                    "first" * (k == 0),
                    (*case, time, other.provider, f"{other.median_ms:.4g}", factor),
                )
            )
    title = (
        f"Where reft_kernels is slower than another provider by more than noise: {len(losses)} of "
        f"{_count(rows)} cases"
    )
    return f"<h3>{title}</h3>{_table(head, lines, 6)}"


def _count(rows: Sequence[Measurement]) -> int:
    return sum(len(compare.chosen(case)) for case in compare.cases(rows))


def _suite_section(name: str, rows: Sequence[Measurement], drawn: Sequence[plots.Plot]) -> str:
    module = suites.load(name)
    head = f"<h3>{_text(module.TITLE)}</h3><p>{_text(module.ABOUT)}</p>"
    if not rows:
        return f'{head}<p class="missing">not measured on this device</p>'
    figures = "\n".join(_figure(plot) for plot in drawn)
    return (
        f"{head}\n{figures}\n<details open><summary>all rows "
        f"({len(rows)})</summary>{_results(rows)}</details>"
    )


def _device(device: str, rows: Sequence[Measurement], figures: Path) -> str:
    parts = [f'<h2 id="{_text(device)}">{_text(device)}</h2>', _environment(rows), _behind(rows)]
    for name in suites.NAMES:
        suite_rows = [row for row in rows if row.suite == name]
        drawn = plots.draw(suite_rows, figures, [name]) if suite_rows else []
        parts.append(_suite_section(name, suite_rows, drawn))
    return "\n".join(parts)


def without_gpu(devices: dict[str, list[Measurement]]) -> list[str]:
    """Return the suites that have no rows from a GPU."""
    measured = {row.suite for rows in devices.values() if compare.on_gpu(rows) for row in rows}
    return [name for name in suites.NAMES if name not in measured]


def _estimates(results: Path) -> str:
    """Return the section of estimates, apart from all measured rows; empty without estimates."""
    table = estimates.read(results)
    if table is None:
        return ""
    lines = [("first" if row[0] else "", row) for row in table.rows]
    notes = "".join(f"<li>{_text(line)}</li>" for line in table.assumptions)
    return (
        '<h2 id="estimates">Estimates for a GPU: not measured</h2>'
        f"<p>{_text(table.title)}; kernels of commit {_text(table.commit)}. {_text(table.note)}</p>"
        f'{_table(table.head, lines, 4)}<ul class="faint">{notes}</ul>'
    )


def render(devices: dict[str, list[Measurement]], results: Path) -> str:
    """Return the page for the newest rows of each device.

    The figures are written to ``results/<device>/figures``.

    Raises:
        ValueError: If rows name a suite that does not exist.
    """
    unknown = {row.suite for rows in devices.values() for row in rows} - set(suites.NAMES)
    if unknown:
        raise ValueError(
            f"suite: got {', '.join(sorted(unknown))}, expected one of {', '.join(suites.NAMES)}"
        )
    missing = "".join(
        f'<li>{_text(suites.load(name).TITLE)}: <span class="missing">{NO_GPU}</span></li>'
        for name in without_gpu(devices)
    )
    links = " ".join(f'<a href="#{_text(device)}">{_text(device)}</a>' for device in devices)
    body = "\n".join(
        _device(device, rows, results / device / "figures") for device, rows in devices.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>reft_kernels: benchmarks</title><style>{_CSS}</style></head><body>
<h1>reft_kernels: benchmarks</h1>
<p>Medians with the 20th and 80th percentile. Providers are timed in turn in one process. The ratio
is the time divided by the baseline's time in the same rounds; below 1 is faster. A provider that is
incorrect, not installed or out of memory has a note instead of a time.</p>
<nav>{links or "nothing measured"}</nav>
{f"<ul>{missing}</ul>" if missing else ""}
{body}
{_estimates(results)}
</body></html>
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page", description="Write one HTML page of all raw rows."
    )
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS, metavar="RESULTS_DIR")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE.html")
    args = parser.parse_args(argv)
    try:
        text = render(compare.devices(args.results), args.results)
        write_text(args.out, text)
    except compare.UNREADABLE as reason:
        print(f"page: {reason}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
