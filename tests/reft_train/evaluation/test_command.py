"""``reft-train eval``: a run's folder is scored, bad input is refused in one line, and nothing
is written then.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from reft_train import tasks
from reft_train.__main__ import main
from reft_train.config import dump_yaml
from reft_train.evaluation.scoring import score_set
from reft_train.methods import save_adapter
from reft_train.tasks.base import Row
from reft_train.training.prepare import find_rows

from tests.reft_train import tiny
from tests.reft_train.evaluation.conftest import CAPITALS, adapted

ROWS = [
    {"instruction": text, "input": "", "output": "", "answer": ("true", "false")[number % 2]}
    for number, text in enumerate(CAPITALS)
]


@pytest.fixture
def data(tmp_path):
    """A data folder with two of the commonsense sets."""
    for name in ("boolq", "piqa"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "test.json").write_text(json.dumps(ROWS))
    return tmp_path / "data"


@pytest.fixture
def finished(tiny_llama, data, tmp_path):
    """A run's folder with settings and adapter, and the settings and model that it holds."""
    config, loaded = adapted(
        tiny_llama, task="commonsense", data=str(data), output=str(tmp_path / "run")
    )
    save_adapter(loaded.model, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(config))
    return tmp_path / "run", config, loaded


def evaluate(*flags):
    return main(["eval", *map(str, flags)])


def said(folder, name="boolq"):
    return [
        json.loads(line)["generated"]
        for line in (folder / "predictions" / f"{name}.jsonl").read_text().splitlines()
    ]


def test_a_run_is_scored_with_its_own_settings_and_adapter(finished, capsys):
    folder, config, loaded = finished
    assert evaluate("--run", folder) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[:4]] == [
        "set",
        "boolq",
        "piqa",
        "average",
    ]
    rows = [Row(row, "row") for row in ROWS]
    expected = score_set("boolq", rows, loaded, tasks.get("commonsense"), config, progress=False)
    assert said(folder / "eval") == [line["generated"] for line in expected.predictions]
    scores = json.loads((folder / "eval" / "scores.json").read_text())
    assert list(scores["sets"]) == ["boolq", "piqa"] and scores["sets"]["boolq"] == {
        **expected.metrics,
        "rows": 7,
    }
    assert scores["task"] == "commonsense" and scores["adapter"] == str(folder / "adapter")


def test_flags_win_over_the_runs_settings(finished, tmp_path, data):
    folder, _, _ = finished
    out = tmp_path / "out"
    flags = [
        "--test",
        data / "piqa" / "test.json",
        "--test-rows",
        2,
        "--max-new-tokens",
        1,
        "--eval-batch-size",
        1,
    ]
    assert evaluate("--run", folder, "--out", out, *flags) == 0
    assert [path.name for path in (out / "predictions").iterdir()] == ["piqa.jsonl"] and len(
        said(out, "piqa")
    ) == 2
    assert json.loads((out / "scores.json").read_text())["settings"]["max_new_tokens"] == 1
    assert not (folder / "eval").exists()


def test_a_data_folder_wins_over_the_runs_test_files(finished, tmp_path, data):
    folder, config, _ = finished
    (folder / "config.yaml").write_text(
        dump_yaml(config.replace(test=[str(tmp_path / "gone.json")]))
    )
    assert evaluate("--run", folder, "--data", data) == 0
    assert set(os.listdir(folder / "eval" / "predictions")) == {"boolq.jsonl", "piqa.jsonl"}


def test_a_runs_training_file_may_be_gone(finished):
    folder, config, _ = finished
    (folder / "config.yaml").write_text(
        dump_yaml(config.replace(train=str(folder / "gone.json"), skip_test=True))
    )
    assert evaluate("--run", folder, "--test-rows", 1) == 0


def test_the_frozen_model_answers_otherwise(finished, tmp_path, tiny_llama, data):
    folder, _, _ = finished
    small = ["--max-new-tokens", 6, "--max-length", 96, "--device", "cpu", "--data", data]
    assert evaluate("--run", folder) == 0
    assert evaluate("--run", folder, "--adapter", "none", "--out", tmp_path / "a") == 0
    assert (
        evaluate(
            "--model",
            tiny_llama,
            "--task",
            "boolq",
            "--adapter",
            "none",
            "--out",
            tmp_path / "b",
            *small,
        )
        == 0
    )
    adapter = ["--adapter", folder / "adapter", "--out", tmp_path / "c"]
    assert evaluate("--model", tiny_llama, "--task", "boolq", *adapter, *small) == 0
    assert (
        said(tmp_path / "a")
        == said(tmp_path / "b")
        != said(tmp_path / "c")
        == said(folder / "eval")
    )


def test_an_adapter_names_its_model(finished, tmp_path, tiny_llama, data):
    folder, config, _ = finished
    path = folder / "adapter" / "adapter_config.json"
    flags = [
        "--adapter",
        folder / "adapter",
        "--task",
        "boolq",
        "--data",
        data,
        "--device",
        "cpu",
        "--max-new-tokens",
        3,
    ]
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tiny_llama)})
    )
    assert evaluate(*flags, "--out", tmp_path / "named") == 0
    assert evaluate(*flags, "--out", tmp_path / "given", "--model", tiny_llama) == 0
    assert said(tmp_path / "named") == said(tmp_path / "given")
    assert json.loads((tmp_path / "named" / "scores.json").read_text())["model"] == str(tiny_llama)


@pytest.mark.parametrize("content", ["{", "[1]", "3"])
@pytest.mark.parametrize(
    "file", ["adapter/adapter_config.json", "base_model.json", "adapter/base_model.json"]
)
def test_a_broken_record_is_refused(finished, data, content, file, capsys):
    folder, _, _ = finished
    (folder / file).write_text(content)
    given = (
        ["--run", folder]
        if "base" in file
        else ["--adapter", folder / "adapter", "--task", "boolq", "--data", data]
    )
    assert evaluate(*given) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and f"got {folder / file}" in error
        and "expected a whole JSON file" in error
    )


def test_instruct_writes_what_a_judge_reads(tmp_path, tiny_llama, capsys):
    (tmp_path / "alpaca_eval.json").write_text(json.dumps([{"instruction": "count", "output": ""}]))
    flags = [
        "--model",
        tiny_llama,
        "--task",
        "instruct",
        "--adapter",
        "none",
        "--max-new-tokens",
        3,
        "--device",
        "cpu",
    ]
    assert evaluate(*flags, "--test", tmp_path / "alpaca_eval.json", "--out", tmp_path / "out") == 0
    (line,) = (tmp_path / "out" / "predictions" / "alpaca_eval.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["instruction"] == "count" and row["right"] is None
    assert row["prediction"] == row["generated"].strip()
    assert "judge" in capsys.readouterr().err


def glue_rows(count):
    return [
        {"sentence1": f"first {i}", "sentence2": f"second {i}", "label": i % 2, "idx": i}
        for i in range(count)
    ]


def test_glue_is_scored_on_the_half_that_did_not_choose_the_model(tmp_path, tiny_bert):
    (tmp_path / "data" / "rte").mkdir(parents=True)
    (tmp_path / "data" / "rte" / "validation.json").write_text(json.dumps(glue_rows(10)))
    config, loaded = adapted(
        tiny_bert, task="glue/rte", data=str(tmp_path / "data"), positions="f1"
    )
    save_adapter(loaded.model, tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(config))
    tests = find_rows(config, tasks.get(config.task), train=False).tests
    reported = [row.fields["idx"] for row in tests["validation"]]
    assert len(reported) == 5
    for flags, expected in [((), reported), (("--test-rows", 2), reported[:2])]:
        assert evaluate("--run", tmp_path / "run", *flags) == 0
        lines = (
            (tmp_path / "run" / "eval" / "predictions" / "validation.jsonl")
            .read_text()
            .splitlines()
        )
        assert [json.loads(line)["idx"] for line in lines] == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run", "{tmp}/nowhere"], "--run: got {tmp}/nowhere, without a config.yaml"),
        (
            ["--run", "{run}", "--adapter", "{tmp}"],
            "--adapter: got {tmp}, without an adapter_config.json",
        ),
        (
            ["--adapter", "{tmp}", "--task", "boolq"],
            "--adapter: got {tmp}, without an adapter_config.json",
        ),
        (["--model", "{model}", "--task", "boolq", "--data", "{data}"], "--adapter: got nothing"),
        (["--task", "boolq", "--adapter", "none"], "--model: got none"),
        (["--model", "{model}", "--adapter", "none"], "task: got none"),
        (["--run", "{run}", "--task", "bool"], "task: got 'bool', expected one of"),
        (
            ["--model", "{model}", "--task", "boolq", "--adapter", "none"],
            "--test: got nothing for task boolq",
        ),
        (
            ["--run", "{run}", "--test", "{tmp}/gone.json"],
            "--test: got {tmp}/gone.json, which does not exist",
        ),
        (
            ["--run", "{run}", "--model", "{other}"],
            "adapter: got a model with num_hidden_layers 3, but {run}/adapter was trained with",
        ),
        (
            ["--run", "{run}", "--model", "{tmp}"],
            "model: got '{tmp}', without config.json, expected a folder with config.json",
        ),
        (["--run", "{run}", "--out", "{run}/config.yaml"], "--out: got {run}/config.yaml, but"),
        (
            ["--run", "{run}", "--temperature", "-1"],
            "temperature: got '-1', expected greater than or equal to 0",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    flags, message, finished, tiny_llama, data, tmp_path, capsys, monkeypatch
):
    other = tmp_path / "other"
    tiny.save_llama(other)
    changed = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**changed, "num_hidden_layers": 3}))
    places = {
        "tmp": tmp_path,
        "run": finished[0],
        "model": tiny_llama,
        "data": data,
        "other": other,
    }
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    capsys.readouterr()
    assert evaluate(*(flag.format(**places) for flag in flags)) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"reft_train eval: error: {message.format(**places)}")
        and error.count("\n") == 1
    )
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_help_does_not_need_torch():
    code = (
        "import sys; sys.modules['torch'] = None; from reft_train.__main__ import main; "
        "main(['eval', '--help'])"
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0 and "--adapter" in done.stdout, done.stderr
