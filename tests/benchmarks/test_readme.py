"""The figures of docs/measured.md: generated from the newest rows, told when stale, losing cases beside winning ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib", reason="the package matplotlib is not installed")

from benchmarks import readme, suites
from benchmarks.readme import BEGIN, END
from tests.benchmarks import GPU, edits, row, write


@pytest.fixture(autouse=True)
def _titles(monkeypatch):
    """Titles without the suites' imports."""
    monkeypatch.setattr(suites, "load", lambda name: SimpleNamespace(TITLE=f"Title of {name}"))


@pytest.fixture
def place(tmp_path):
    """A page with empty markers, and a folder of results."""
    path = tmp_path / "measured.md"
    path.write_bytes(f"# Name\n\n{BEGIN}\n{END}\n\nlast line, \u00e9\n".encode())
    return path, write(tmp_path / "results", edits())


def _figures(*found) -> list[str]:
    devices = {}
    for one in found:
        devices.setdefault(one.device, []).append(one)
    return readme.figures(devices).splitlines()


def _tables(lines: list[str]) -> list[tuple[str, list[list[str]]]]:
    """Each heading that has a table, with the table's cells, its head first."""
    found: list[tuple[str, list[list[str]]]] = []
    for line in lines:
        if line.startswith("### "):
            found.append((line.removeprefix("### "), []))
        elif line.startswith("| "):
            found[-1][1].append([cell.strip() for cell in line.split("|")[1:-1]])
    return [(heading, cells) for heading, cells in found if cells]


def _table(lines: list[str]) -> list[list[str]]:
    """The rows of the only table, without its head."""
    ((_, cells),) = _tables(lines)
    return cells[1:]


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
    assert [entry.name for entry in path.parent.iterdir() if entry.is_file()] == ["measured.md"]


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
    lines = _figures(*edits())
    ((heading, (head, line)),) = _tables(lines)
    assert heading == "Title of edit_all_rows, forward"
    assert "Device some-cpu-2-threads; time over that of: eager, unfolded." in lines
    assert head == [
        "case",
        "dtype",
        "eager, unfolded",
        "reft_kernels",
        "torch.compile, folded",
        "pyreft",
    ]
    assert line == [
        "rows=4096 d=4096 r=8",
        "float32",
        "4 ms",
        "**0.5 (50% of clone)**",
        "0.312",
        "absent",
    ]


def test_dtypes_have_lines_and_devices_have_tables_of_their_own():
    half = [row(median=1.0, ratio=0.25, clone_fraction=0.5, dtype="bfloat16")]
    tables = _tables(_figures(*edits(), *half, *edits(**GPU)))
    assert [len(cells) for _, cells in tables] == [3, 2]
    assert tables[0][1][1][1:4] == ["float32", "4 ms", "**0.5 (50% of clone)**"]
    assert tables[0][1][2] == [
        "rows=4096 d=4096 r=8",
        "bfloat16",
        "-",
        "**0.25 (50% of clone)**",
        "-",
        "-",
    ]


def test_no_cell_has_a_slash():
    for _, cells in _tables(
        readme.PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].splitlines()
    ):
        assert not [cell for line in cells for cell in line if "/" in cell]


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
    assert _table(lines)[0][3] == "**wrong**"


def test_gpu_not_measured():
    told = {f"- Title of {name}: GPU: not measured" for name in suites.NAMES}
    assert told <= set(_figures(*edits()))
    assert {line for line in _figures(*edits(**GPU)) if "not measured" in line} == told - {
        "- Title of edit_all_rows: GPU: not measured"
    }
    assert told <= set(_figures())


def _shapes(suite: str, mode: str, *shapes: str) -> list[str]:
    found = _figures(
        *(row(median=1.0, ratio=1.0, suite=suite, mode=mode, shape=shape) for shape in shapes)
    )
    return [line[0] for _, cells in _tables(found) for line in cells[1:]]


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
    assert [line[0] for line in shown] == ["batch=32 lengths=boolq", "batch=32 lengths=questions"]
    assert all(line[1:] == ["float32", "4 ms", "0.5"] for line in shown)


def test_very_small_ratios_have_three_digits():
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
    ((_, (head, line)),) = _tables(_figures(*found))
    assert head[2:] == [case["baseline"], "reft_kernels householder"] and line[2:] == [
        "185 ms",
        "**0.00027**",
    ]
    assert readme._times(1 / 45678) == "0.0000219"


def test_bars_in_names_do_not_end_cells():
    ((_, (head, line)),) = _tables(_figures(*edits(), row("a|b", 3.0, ratio=0.75)))
    assert (head[-1], line[-1]) == ("a&#124;b", "0.75")
