"""The README's figures: generated from the newest rows, told when stale, losing cases beside
winning ones.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import readme, suites
from benchmarks.readme import BEGIN, END
from tests.benchmarks import GPU, edits, row, write


@pytest.fixture(autouse=True)
def _titles(monkeypatch):
    """Titles without the suites' imports."""
    monkeypatch.setattr(suites, "load", lambda name: SimpleNamespace(TITLE=f"Title of {name}"))


@pytest.fixture
def place(tmp_path):
    """A README with empty markers, and a folder of results."""
    path = tmp_path / "README.md"
    path.write_bytes(f"# Name\n\n{BEGIN}\n{END}\n\nlast line, \u00e9\n".encode())
    return path, write(tmp_path / "results", edits())


def _figures(*found) -> list[str]:
    devices = {}
    for one in found:
        devices.setdefault(one.device, []).append(one)
    return readme.figures(devices).splitlines()


def _table(lines: list[str]) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")
    ][1:]


def test_check_detects_a_stale_table_and_writing_is_idempotent(place, capsys):
    path, results = place
    empty = path.read_bytes()
    assert readme.main(["--check"], *place) == 1
    assert "does not show the newest rows" in capsys.readouterr().err and path.read_bytes() == empty
    assert readme.main([], *place) == 0
    first = path.read_bytes()
    assert first.startswith(f"# Name\n\n{BEGIN}\n".encode()) and first.endswith(
        f"{END}\n\nlast line, \u00e9\n".encode()
    )
    assert readme.main(["--check"], *place) == 0
    assert readme.main([], *place) == 0 and path.read_bytes() == first
    write(results, edits(when="2026-03-01T00:00:00Z", median_ms=7.0))
    assert readme.main(["--check"], *place) == 1
    assert readme.main([], *place) == 0 and path.read_bytes() != first
    assert [entry.name for entry in path.parent.iterdir() if entry.is_file()] == ["README.md"]


def test_a_figure_edited_by_hand_is_stale(place):
    readme.main([], *place)
    path = place[0]
    path.write_text(
        path.read_text(encoding="utf-8").replace("0.5 (50% of clone)", "0.4 (50% of clone)"),
        encoding="utf-8",
    )
    assert readme.main(["--check"], *place) == 1


@pytest.mark.parametrize(
    "text", ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"]
)
@pytest.mark.parametrize("arguments", [[], ["--check"]])
def test_markers_missing(place, capsys, text, arguments):
    path = place[0]
    path.write_text(text)
    assert readme.main(arguments, *place) == 2
    assert (
        "markers: expected one <!-- figures -->" in capsys.readouterr().err
        and path.read_text() == text
    )


def test_unreadable_rows(place, capsys):
    (place[1] / "some-cpu-2-threads" / "old.csv").write_text("suite,provider\n")
    assert readme.main([], *place) == 2
    err = capsys.readouterr().err
    assert err.startswith("readme: ") and "old.csv" in err and err.count("\n") == 1


def test_winning_and_losing_figures_stand_in_one_line():
    (line,) = _table(_figures(*edits()))
    assert line == [
        "Title of edit_all_rows, forward",
        "rows=4096 d=4096 r=8, float32",
        "some-cpu-2-threads",
        "eager, unfolded: 4 ms",
        "**0.5 (50% of clone)**",
        "torch.compile, folded 0.312; pyreft absent",
    ]


def test_dtypes_share_a_line_and_devices_do_not():
    half = [row(median=1.0, ratio=0.25, clone_fraction=0.5, dtype="bfloat16")]
    lines = _table(_figures(*edits(), *half, *edits(**GPU)))
    assert [line[2] for line in lines] == ["some-cpu-2-threads", "some-gpu"]
    assert (
        lines[0][1].endswith("float32 / bfloat16")
        and lines[0][4] == "**0.5 (50% of clone) / 0.25 (50% of clone)**"
    )
    assert (
        lines[0][3] == "eager, unfolded: 4 ms / -"
        and lines[0][5] == "torch.compile, folded 0.312 / -; pyreft absent / -"
    )


def test_losing_cases_are_listed():
    text = "\n".join(_figures(*edits(), *edits(**GPU, mode="both")))
    assert "slower than another provider by more than noise (2 of 2 cases):" in text
    assert (
        "- Title of edit_all_rows, forward, rows=4096 d=4096 r=8, float32, some-cpu-2-threads: "
        "torch.compile, folded 1.6 times faster"
    ) in text
    assert "forward + backward, rows=4096 d=4096 r=8, float32, some-gpu: torch.compile" in text
    assert "torch.clone 2" not in text


def test_the_worst_twelve_and_the_count():
    found = []
    for number in range(2, 17):
        shape = f"rows={number} d=64 r=8"
        found += [row(median=float(number), shape=shape), row("eager, folded", 1.0, shape=shape)]
    lines = _figures(*found)
    listed = [line for line in lines if line.endswith("times faster")]
    assert len(listed) == 12 and "16 times" in listed[0] and "5 times" in listed[-1]
    assert any(
        "(15 of 15 cases, the 12 worst here" in line and "benchmarks.page" in line for line in lines
    )


def test_no_losing_case():
    lines = _figures(*[one for one in edits() if not one.provider.startswith("torch.compile")])
    assert "Where reft_kernels is slower than another provider: in none of 1 cases." in lines


def test_failing_where_others_do_not_is_listed():
    lines = _figures(row(note="wrong: error 1"), row("eager, unfolded", 1.0, ratio=1.0))
    assert any(
        line.endswith("reft_kernels has no time (wrong: error 1), eager, unfolded has one")
        for line in lines
    )
    assert _table(lines)[0][4] == "**wrong**"


def test_gpu_not_measured():
    told = {f"- Title of {name}: GPU: not measured" for name in suites.NAMES}
    assert told <= set(_figures(*edits()))
    assert {line for line in _figures(*edits(**GPU)) if "not measured" in line} == told - {
        "- Title of edit_all_rows: GPU: not measured"
    }
    assert told <= set(_figures())


def _shapes(suite: str, mode: str, *shapes: str) -> list[str]:
    lines = _table(
        _figures(
            *(row(median=1.0, ratio=1.0, suite=suite, mode=mode, shape=shape) for shape in shapes)
        )
    )
    return [line[1].removesuffix(", float32") for line in lines]


@pytest.mark.parametrize("mode", ["forward", "inside"])
def test_picked_edits(mode):
    star = [f"rows={n} d=4096 r=8" for n in (256, 4096)] + [
        f"rows=4096 d=4096 r={r}" for r in (1, 32)
    ]
    assert _shapes("edit_all_rows", mode, *star, "rows=4096 d=768 r=8") == [
        "rows=4096 d=4096 r=8",
        "rows=4096 d=4096 r=32",
    ]


def test_picked_selected_rows():
    shapes = [f"batch=8 T={t} positions=f7+l7 d=4096 r=8" for t in (128, 512, 2048)]
    other = "batch=64 T=512 positions=f7+l7 d=4096 r=8"
    assert _shapes("edit_selected_rows", "forward", *shapes, other) == shapes[1:]
    longer = [shape.replace("T=2048", "T=8192") for shape in shapes]
    longest = shapes[2].replace("T=2048", "T=16384")
    assert _shapes("edit_selected_rows", "forward", *shapes, *longer, longest, other) == [
        shapes[1],
        longer[2],
    ]


def test_picked_builds():
    shapes = [
        f"layers={n} d={d} r={r}"
        for n, d, r in ((1, 768, 8), (1, 4096, 8), (1, 4096, 32), (32, 4096, 8), (32, 4096, 1))
    ]
    assert _shapes("r_build", "both", *shapes) == [shapes[1], shapes[3]]
    assert _shapes("r_build", "forward", *shapes) == []


@pytest.mark.parametrize("switch", ["checkpointing", "compiled"])
def test_picked_models(switch):
    shapes = [
        f"model={m} batch={n} T=64 positions=f7+l7 r=8"
        for m, n in (("small", 1), ("small", 4), ("large", 2))
    ]
    assert _shapes("training_step", "step", *shapes, f"{shapes[1]} {switch}=1") == shapes[1:]


def test_generation_shows_both_modes():
    shape = "model=small batch=1 T=64 positions=f7+l7 r=8"
    assert (
        _shapes("generation", "prefill", shape) == _shapes("generation", "decode", shape) == [shape]
    )


def test_packing_shows_every_distribution_beside_padding():
    lines = []
    for lengths in ("boolq", "questions"):
        case = {
            "suite": "packing",
            "mode": "step",
            "baseline": "padding",
            "shape": f"batch=32 lengths={lengths}",
        }
        lines += [row("padding", 4.0, ratio=1.0, **case), row("packing", 2.0, ratio=0.5, **case)]
    shown = _table(_figures(*lines))
    assert [line[1] for line in shown] == [
        "batch=32 lengths=boolq, float32",
        "batch=32 lengths=questions, float32",
    ]
    assert all(line[3:] == ["padding: 4 ms", "", "packing 0.5"] for line in shown)


def test_very_small_ratios_are_read_as_fractions():
    case = {
        "suite": "r_build",
        "mode": "both",
        "shape": "layers=1 d=4096 r=8",
        "baseline": "parametrizations.orthogonal",
    }
    found = [
        row("reft_kernels householder", 0.05, ratio=1 / 3700, **case),
        row(case["baseline"], 185.0, ratio=1.0, **case),
    ]
    (line,) = _table(_figures(*found))
    assert line[3:5] == ["parametrizations.orthogonal: 185 ms", "**householder 1/3,700**"]


def test_bars_in_names_do_not_end_cells():
    assert _table(_figures(*edits(), row("a|b", 3.0, ratio=0.75)))[0][5].endswith("a&#124;b 0.75")
