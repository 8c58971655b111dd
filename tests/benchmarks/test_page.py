"""Tests of the benchmark page and its figures."""

from __future__ import annotations

import base64
import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib", reason="the package matplotlib is not installed")

from matplotlib.figure import Figure

from benchmarks import page, plot_style, plots, suites
from benchmarks.roofline import saved
from benchmarks.roofline.saved import Saved
from benchmarks.rows import Measurement
from tests.benchmarks import GPU, edits, row, write


def _render(devices):
    """Return the page. Its figures are written to a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        return page.render(devices, Path(folder))


@pytest.fixture(autouse=True)
def _titles(monkeypatch):
    """Replace the suites' modules, so that they are not imported."""
    monkeypatch.setattr(
        suites,
        "load",
        lambda name: SimpleNamespace(TITLE=f"<{name}>", ABOUT=f"about {name} & more"),
    )


class _Page(HTMLParser):
    """Parse a page into text, links and cells. Raises if tags are not closed in order."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.open, self.addresses, self.cells = "", [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def _selected(**values: object) -> list[Measurement]:
    found = []
    for length in (128, 512, 2048):
        case = {
            "suite": "edit_selected_rows",
            "shape": f"batch=8 T={length} positions=f7+l7 d=64 r=8",
        } | values
        found += [
            row("the rows alone", 1.0, **case),
            row(median=1.1, **case),
            row("eager, in place", length / 50, **case),
        ]
    return found


def _steps(**values: object) -> list[Measurement]:
    found = []
    for model, time in (("llama-512x4", 1.0), ("llama-2048x4", 9.0)):
        case = {
            "suite": "training_step",
            "mode": "step",
            "shape": f"model={model} batch=4 T=64 positions=f7+l7 r=8",
            "baseline": "frozen model",
        } | values
        found += [row("frozen model", time, ratio=1.0, peak_bytes=1 << 22, **case)]
        found += [
            row(median=0.9 * time, ratio=0.9, peak_bytes=1 << 21, **case),
            row("pyreft", note="out of memory", **case),
        ]
    return found


def _deeper() -> Measurement:
    shape = "model=llama-512x8 batch=4 T=64 positions=f7+l7 r=8"
    return row(
        median=2.0, ratio=0.9, peak_bytes=1 << 22, suite="training_step", mode="step", shape=shape
    )


def _builds(**values: object) -> list[Measurement]:
    case = {"suite": "r_build", "mode": "both"} | values
    own = [
        row("reft_kernels householder", 1.0, shape=f"layers={n} d=64 r=8", baseline="x", **case)
        for n in (1, 32)
    ]
    return [*own, row("parametrizations.orthogonal", 100.0, shape="layers=1 d=64 r=8", **case)]


def test_page_is_complete_escaped_and_self_contained():
    text = _render({"some-cpu-2-threads": edits(shape="rows=4096 d=4096 r=8 x=<i>")})
    seen = _Page(text)
    assert "<not>" not in text and "<i>" not in text and "<edit_all_rows>" not in text
    assert (
        "absent: pyreft is <not> installed" in seen.cells
        and "rows=4096 d=4096 r=8 x=<i>" in seen.cells
    )
    for provider in (
        "torch.clone",
        "reft_kernels",
        "eager, unfolded",
        "torch.compile, folded",
        "pyreft",
    ):
        assert provider in seen.cells
    assert {"1.9-2.1", "0.5", "50%"} <= set(seen.cells)
    assert "about edit_all_rows & more" in seen.words
    assert all(
        address.startswith(("data:image/svg+xml;base64,", "#")) for address in seen.addresses
    )
    assert "http" not in text


def test_environment():
    cells = _Page(_render({"some-cpu-2-threads": edits()})).cells
    assert {"abc1234", "2.13.0", "5.1", "2026-01-01T00:00:00Z", "malloc", "edit_all_rows"} <= set(
        cells
    )


def test_losing_cases_are_listed():
    seen = _Page(_render({"some-cpu-2-threads": edits()}))
    assert "slower than another provider by more than noise: 1 of 1 cases" in seen.words
    assert "1.6" in seen.cells
    winning = [one for one in edits() if not one.provider.startswith("torch.compile")]
    assert "slower than another provider in no case" in _Page(_render({"d": winning})).words


def test_gpu_not_measured():
    """Every suite without GPU rows is marked, with CPU rows and without any rows."""
    cpu = {"some-cpu-2-threads": edits()}
    assert _Page(_render(cpu)).words.count(page.NO_GPU) == len(suites.NAMES)
    assert _Page(_render({})).words.count(page.NO_GPU) == len(suites.NAMES)
    both = _Page(_render(cpu | {"some-gpu": edits(**GPU)})).words
    assert (
        both.count(page.NO_GPU) == len(suites.NAMES) - 1
        and f"<edit_all_rows>: {page.NO_GPU}" not in both
    )


def test_unknown_suite_and_missing_module(monkeypatch):
    with pytest.raises(ValueError, match="suite: got mystery"):
        _render({"d": [row(median=1.0, suite="mystery")]})
    monkeypatch.undo()
    monkeypatch.setattr(suites, "NAMES", ("no_such_module",))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        _render({})


def test_main(tmp_path, capsys):
    out = tmp_path / "page.html"
    results = write(tmp_path / "results", edits())
    assert page.main([str(results), "--out", str(out)]) == 0
    first = out.read_bytes()
    assert page.main([str(results), "--out", str(out)]) == 0 and out.read_bytes() == first
    (results / "some-cpu-2-threads" / "old.csv").write_text("suite,provider\n")
    capsys.readouterr()
    assert page.main([str(results), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("page: ") and "old.csv" in err and err.count("\n") == 1
    assert out.read_bytes() == first


def test_missing_figures_are_returned_by_title(tmp_path):
    drawn = plots.draw([], tmp_path)
    assert {plot.title.split(",")[0] for plot in drawn} == {
        "Bandwidth against rows",
        "Speed-up over eager",
        "Selected rows: time against sequence length",
        "Build of R: speed-up over parametrizations.orthogonal",
        "Training step over the frozen model",
        "Peak memory of a training step",
        "Peak memory against layers",
        "Step of the training program over the frozen model",
        "Packed batches over padded ones",
    }
    assert all(plot.path is None for plot in drawn) and not list(tmp_path.iterdir())


def test_every_figure_is_drawn(tmp_path):
    found = [
        *edits(),
        *edits(mode="backward"),
        *_selected(),
        *_steps(),
        *_builds(),
        _deeper(),
        *_programs(),
    ]
    drawn = plots.draw(found, tmp_path)
    assert len(drawn) == 9 and len({plot.path for plot in drawn}) == 9
    assert all(plot.path.read_text().rstrip().endswith("</svg>") for plot in drawn)


def test_rows_without_times_draw_nothing_and_the_page_says_so():
    text = _render({"d": [row("pyreft", note="absent: x"), row(note="out of memory")]})
    assert "not measured</span>: Bandwidth against rows, float32" in text and "<img" not in text


def test_allocators_have_their_own_figures(tmp_path):
    drawn = plots.draw([*edits(), *edits(allocator="huge pages")], tmp_path, ["edit_all_rows"])
    assert {plot.title.rsplit(", ", 1)[1] for plot in drawn} == {"malloc", "huge pages"}
    assert len({plot.path for plot in drawn}) == 4


def _programs() -> list[Measurement]:
    program = {
        "suite": "trainer_step",
        "mode": "step",
        "baseline": "frozen model",
        "shape": "model=llama-512x4 batch=4 T=64",
    }
    found = [
        row("frozen model", 1.0, ratio=1.0, **program),
        row("reft_kernels, Trainer", 1.2, ratio=1.2, **program),
    ]
    for lengths in ("boolq", "questions"):
        case = {
            "suite": "packing",
            "mode": "step",
            "baseline": "padding",
            "shape": f"model=m batch=32 lengths={lengths}",
        }
        found += [row("padding", 4.0, ratio=1.0, **case), row("packing", 2.0, ratio=0.5, **case)]
    return found


def test_packing_bars_are_named_by_their_lengths():
    (axes,) = _drawn(plots.packing, _programs()).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "m\nlengths = boolq",
        "m\nlengths = questions",
    ]
    assert [patch.get_height() for patch in axes.patches] == [0.5, 0.5]


def _drawn(drawer, found: list[Measurement]) -> Figure:
    ((_, _, figure),) = drawer(found, "")
    return figure


def _lines(axes) -> dict[str, list[float]]:
    return {
        line.get_label(): list(line.get_ydata())
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def test_bandwidth_values():
    forward, backward = _drawn(plots.bandwidth, edits()).axes
    assert _lines(forward)["reft_kernels"] == [0.5] and _lines(forward)["torch.clone"] == [1.0]
    assert not _lines(backward)


def test_speed_up_values():
    """Speed-ups use the paired ratio of rows with that baseline, else the medians."""
    found = [*edits(), row("eager, folded", 2.0, baseline="other", ratio=9.0)]
    lines = _lines(_drawn(plots.speed_up, found).axes[0])
    assert (
        lines["reft_kernels"] == [2.0]
        and lines["eager, folded"] == [2.0]
        and lines["eager, unfolded"] == [1.0]
    )
    assert "torch.clone" not in lines


def test_build_of_several_layers_is_held_against_one_as_often():
    layers = _drawn(plots.r_build, _builds()).axes[3]
    assert _lines(layers) == {"reft_kernels householder": [100.0, 3200.0]}


def test_selected_is_logarithmic_in_both():
    axes = _drawn(plots.selected_rows, _selected()).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert _lines(axes)["the rows alone"] == [1.0, 1.0, 1.0]


def test_only_the_star_around_the_base_is_drawn():
    """Rows that differ from the base in another dimension are not part of the line."""
    found = [
        *_selected(),
        row(
            median=7.0, suite="edit_selected_rows", shape="batch=64 T=512 positions=f7+l7 d=64 r=8"
        ),
    ]
    assert 7.0 not in _lines(_drawn(plots.selected_rows, found).axes[0])["reft_kernels"]


def test_memory_against_layers_takes_models_that_differ_in_layers_alone():
    (axes,) = _drawn(plots.memory_of_layers, [*_steps(), _deeper()]).axes
    (line,) = (line for line in axes.get_lines() if line.get_label() == "reft_kernels")
    assert [list(values) for values in line.get_data()] == [[4, 8], [2, 4]]


def test_step_bars():
    """Each provider and model has a bar, small models first, or a note if it has no time."""
    (axes,) = _drawn(
        plots.training_steps,
        list(reversed([*_steps(), row("pyreft", 3.0, ratio=3.0, **_pyreft())])),
    ).axes
    assert [round(patch.get_height(), 2) for patch in axes.patches] == [0.9, 0.9, 3.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "llama-512x4",
        "llama-1024x4",
        "llama-2048x4",
    ]
    assert [text.get_text() for text in axes.texts].count("out of memory") == 2


def _pyreft() -> dict[str, object]:
    shape = "model=llama-1024x4 batch=4 T=64 positions=f7+l7 r=8"
    return {"suite": "training_step", "mode": "step", "shape": shape, "baseline": "frozen model"}


def test_colours():
    """Providers that appear in one figure have different colours."""
    meeting = [
        "torch.clone",
        "reft_kernels",
        "reft_kernels, torch backend",
        "reft_kernels, triton backend",
        "reft_kernels, cuda backend",
        "eager, folded",
        "eager, unfolded",
        "torch.compile, folded",
        "pyreft",
    ]
    steps = [
        "frozen model",
        "reft_kernels",
        "eager hooks",
        "eager hooks, cached R",
        "pyreft",
        "adapters",
    ]
    builds = ["reft_kernels householder", "reft_kernels cayley", "householder_product"]
    packing = ["padding", "padding, grouped by length", "packing"]
    for names in (meeting, steps, builds, packing):
        assert len({plot_style.colour(name) for name in names}) == len(names)
    assert re.fullmatch("#[0-9a-f]{6}", plot_style.colour("a name that nobody listed"))


def test_inline_figures_are_svg():
    addresses = _Page(_render({"d": edits()})).addresses
    images = [base64.b64decode(a.split(",", 1)[1]) for a in addresses if a.startswith("data:")]
    assert len(images) == 2 and all(b"<svg" in image for image in images)


def test_estimates_have_a_section_of_their_own(tmp_path):
    table = Saved(
        "d = 512", "abc", ("operator", "ESTIMATE us"), [("edit & more", "7.5")], "n", ["a"]
    )
    saved.write(table, tmp_path)
    text = page.render({"CPU": [row()]}, tmp_path)
    before, _, after = text.partition("Estimates for a GPU: not measured")
    assert "ESTIMATE us" not in before and "7.5" not in before
    assert {"edit & more", "7.5"} <= set(_Page(text).cells)
    assert "kernels of commit abc" in after and "<h2" not in after


def test_a_file_that_is_no_table_of_estimates_is_an_error(tmp_path):
    (tmp_path / saved.NAME).write_text("{}")
    with pytest.raises(ValueError, match="expected a table"):
        page.render({}, tmp_path)
