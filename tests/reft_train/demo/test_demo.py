"""The demo: its data, its three trainings from one start, its table and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from reft_train.__main__ import main, parser
from reft_train.demo import command, training
from reft_train.demo.data import load_docstrings, load_file
from reft_train.errors import UserError

SMALL = {
    "epochs": 1,
    "rank": 2,
    "timing-steps": 3,
    "batch-size": 16,
    "max-length": 24,
    "device": "cpu",
}
FLAGS = [f"--{name}={value}" for name, value in SMALL.items()]


@pytest.fixture
def rows(tmp_path):
    """A file of two labels."""
    path = tmp_path / "rows.csv"
    lines = [f"event loop task {n},asyncio\nheader mail body {n},email\n" for n in range(24)]
    path.write_text("text,label\n" + "".join(lines))
    return path


def run(*flags):
    return command.run(parser().parse_args(["demo", *map(str, flags)]), isolate=False)


def test_the_two_loreft_trainings_coincide(tiny_model, rows, tmp_path, monkeypatch, capsys):
    results = {}
    original = training.train

    def noted(name, *arguments):
        results[name] = original(name, *arguments)
        return results[name]

    monkeypatch.setattr(training, "train", noted)
    flags = [
        "--model",
        tiny_model,
        "--data",
        rows,
        "--positions",
        "f3+l3",
        *FLAGS,
        "--out",
        tmp_path / "out",
    ]
    assert run(*flags) == 0
    assert results["torch"].losses == pytest.approx(results["kernels"].losses, abs=2e-5)
    assert results["frozen"].losses[0] == pytest.approx(results["kernels"].losses[0], abs=1e-5)
    assert [(found.edits, found.head) for found in results.values()] == [
        (0, 50),
        (196, 50),
        (196, 50),
    ]
    printed = capsys.readouterr().out
    for text in (
        "bit-identical",
        "LoReFT, reft_kernels",
        "step / frozen",
        "held-out accuracy",
        "peak memory",
    ):
        assert text in printed
    assert sorted(os.listdir(tmp_path / "out")) == [
        "adapter",
        "loss.png",
        "report.html",
        "results.json",
    ]
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(numbers["results"]) == list(training.TITLES)


def test_an_adapter_that_does_not_come_back_the_same_is_reported(
    tiny_model, rows, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("reft_train.methods.load_adapter", lambda loaded, folder: loaded.model)
    assert run("--model", tiny_model, "--data", rows, *FLAGS, "--out", tmp_path / "out") == 1
    assert "FAILED: the reloaded adapter" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_with_processes_of_its_own(tiny_model, rows, tmp_path, capsys):
    assert (
        main(
            [
                "demo",
                "--model",
                str(tiny_model),
                "--data",
                str(rows),
                *FLAGS,
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert "resident memory" in capsys.readouterr().out


def test_docstrings_hold_out_modules_and_hide_the_label(library):
    data = load_docstrings(library)
    assert data.labels == ["asyncio", "email", "xml"]
    texts = [text for text, _ in (*data.train, *data.held_out)]
    assert len(set(texts)) == len(texts) and not any(
        label in text for label in data.labels for text in texts
    )
    held, kept = (Counter(label for _, label in part) for part in (data.held_out, data.train))
    assert all(0.1 < held[label] / (held[label] + kept[label]) < 0.5 for label in range(3))
    assert load_docstrings(library) == data


def test_a_file_of_instructions_is_read_and_contradictions_go(tmp_path):
    rows = [{"instruction": f"Q{n}", "input": "", "answer": "ab"[n % 2]} for n in range(8)]
    rows += [{"instruction": "same", "answer": "a"}, {"instruction": "SAME", "answer": "b"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = load_file(tmp_path / "rows.json")
    assert data.labels == ["a", "b"] and len(data.train) == 6 and len(data.held_out) == 2


@pytest.mark.parametrize(
    "content, message",
    [
        ("text,label\na,x\nb,x\nc,x\nd,x\n", "with 1 labels, expected at least 2"),
        ("text,label\na,x\nb,x\nc,x\nd,x\ne,y\n", "each of 4 texts"),
        ("text,label\na,x\nb,\n", "row 2 of .*label: got no text"),
        ("text,kind\na,b\n", "got fields text, kind, expected label"),
        ("text,label\n", "without a row"),
    ],
)
def test_bad_files_are_refused(content, message, tmp_path):
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        load_file(tmp_path / "rows.csv")


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, tiny_model, rows, capsys):
    for flags, message in {
        ("--rank", "25"): "rank",
        ("--layers", "0;2"): "layer",
        ("--max-length", "65"): "--max-length: got 65, expected at most 64",
        ("--data", str(tmp_path / "no.csv")): "--data: got",
        ("--model", str(tmp_path / "nowhere")): "model: got",
        ("--out", str(rows)): "is a file",
    }.items():
        given = {
            "--model": str(tiny_model),
            "--data": str(rows),
            "--out": str(tmp_path / "out"),
            flags[0]: flags[1],
        }
        assert main(["demo", *FLAGS, *(text for pair in given.items() for text in pair)]) == 2
        error = capsys.readouterr().err
        assert "reft_train demo: error: " in error and message in error.splitlines()[-1], error
        assert not (tmp_path / "out").exists()


def test_help_does_not_need_torch():
    code = (
        "import sys; sys.modules['torch'] = None; from reft_train.__main__ import main; "
        "main(['demo', '--help'])"
    )
    paths = os.pathsep.join(sys.path)
    command_line, environment = [sys.executable, "-c", code], {"PYTHONPATH": paths}
    done = subprocess.run(
        command_line, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0 and "--positions" in done.stdout, done.stderr
