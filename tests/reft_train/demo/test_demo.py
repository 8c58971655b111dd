"""The demo: its data, its two trainings, its table and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from reft_train import demo
from reft_train.__main__ import main
from reft_train.demo import load_docstrings, load_file
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


def test_both_trainings_are_reported_and_the_adapter_comes_back(tiny_model, rows, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--model", tiny_model, "--data", rows, "--positions", "f3+l3", *FLAGS, "--out", out]
    assert main(["demo", *map(str, flags)]) == 0
    printed = capsys.readouterr().out
    columns = ("identical", "LoReFT, reft_kernels", "step / frozen", "held-out accuracy")
    assert all(text in printed for text in (*columns, "peak memory", "resident memory"))
    files = ["data", "head", "loreft", "loss.png", "report.html", "results.json"]
    assert sorted(os.listdir(out)) == files
    numbers = json.loads((out / "results.json").read_text())
    assert list(numbers["results"]) == list(demo.TITLES)
    counts = [json.loads((out / name / "results.json").read_text()) for name in demo.TITLES]
    assert [(found["trainable"], found["head"]) for found in counts] == [(0, 50), (196, 50)]
    assert (out / "loreft" / "adapter" / "adapter_config.json").is_file()


def test_an_adapter_that_does_not_come_back_the_same_is_reported(
    tiny_model, rows, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("reft_train.methods.load_adapter", lambda loaded, folder: loaded.model)
    flags = ["--model", str(tiny_model), "--data", str(rows), *FLAGS, "--out", str(tmp_path / "o")]
    assert main(["demo", *flags]) == 1
    assert "FAILED: the reloaded adapter" in capsys.readouterr().out


def split(task, folder):
    task.write(folder)
    paths = (folder / "train.jsonl", folder / "test.jsonl")
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def test_docstrings_hold_out_modules_and_hide_the_label(library, tmp_path):
    task = load_docstrings(library)
    assert task.labels == ["asyncio", "email", "xml"]
    train, held_out = split(task, tmp_path)
    texts = [row["text"] for row in (*train, *held_out)]
    assert len(set(texts)) == len(texts)
    assert not any(label in text for label in task.labels for text in texts)
    held, kept = (Counter(row["label"] for row in part) for part in (held_out, train))
    assert all(0.1 < held[label] / (held[label] + kept[label]) < 0.5 for label in task.labels)
    assert split(load_docstrings(library), tmp_path) == [train, held_out]


def test_a_file_of_instructions_is_read_and_contradictions_go(tmp_path):
    rows = [{"instruction": f"Q{n}", "input": "", "answer": "ab"[n % 2]} for n in range(8)]
    rows += [{"instruction": "same", "answer": "a"}, {"instruction": "SAME", "answer": "b"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    task = load_file(tmp_path / "rows.json")
    train, held_out = split(task, tmp_path)
    assert task.labels == ["a", "b"] and (len(train), len(held_out)) == (6, 2)


@pytest.mark.parametrize(
    "content, message",
    [
        ("text,label\na,x\nb,x\nc,x\nd,x\n", "with 1 labels, expected at least 2"),
        ("text,label\na,x\nb,x\nc,x\nd,x\ne,y\n", "each with 4 texts"),
        ("text,label\na,x\nb,\n", "row 2 of .*label: got ''"),
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
