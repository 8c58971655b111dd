"""The command: bad arguments are refused before any training, and a tiny run does all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reft_train.__main__ import main, parser
from reft_train.demo import command as demo
from reft_train.demo import experiment, training, worker
from reft_train.demo.batching import encode
from reft_train.demo.encoder import load_tokenizer
from reft_train.demo.stdlib_docs import load_stdlib
from reft_train.demo.variants import KERNELS, TORCH, VARIANTS, build
from reft_train.errors import UserError
from reft_train.files import check_folder

SMALL = {
    "epochs": 1,
    "rank": 2,
    "timing-steps": 3,
    "batch-size": 16,
    "max-length": 24,
    "device": "cpu",
}
FLAGS = [f"--{name}={value}" for name, value in SMALL.items()]


def parse(*flags):
    return parser().parse_args(["demo", *map(str, flags)])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--rank", "0"),
        ("--rank", "257"),
        ("--rank", "x"),
        ("--epochs", "0"),
        ("--seed", "-1"),
        ("--batch-size", "0"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--lr", "fast"),
        ("--max-length", "2"),
        ("--timing-steps", "1"),
        ("--device", "tpu"),
        ("--positions", "f0"),
        ("--positions", "middle"),
        ("--layers", "0;x"),
        ("--layers", "1;1"),
        ("--layers", ""),
    ],
)
def test_bad_flag_values_name_flag_and_value(flag, value, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(f"{flag}={value}")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and f"argument {flag}" in message and repr(value) in message


def test_flags_that_the_model_decides_about(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    (broken / "model.safetensors").write_text("")
    for flags, message in {
        ("--rank", "25"): "--rank: got 25, expected at most the model's hidden size, 24",
        ("--layers", "0;2"): "--layers: got 2, expected 0 to 1",
        ("--max-length", "65"): "--max-length: got 65, expected at most 64",
        ("--model", tmp_path / "nowhere"): "--model: got .*nowhere, which is not a folder",
        ("--model", tmp_path / "empty"): "--model: got .*empty, expected a folder with config.json",
        ("--model", broken): "--model: got .*broken, whose config.json cannot be used",
    }.items():
        with pytest.raises(UserError, match=message):
            demo.resolve_settings(parse("--model", tiny_model, *flags))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device: got cuda"):
            demo.resolve_settings(
                parse("--model", tiny_model, "--max-length", 24, "--device", "cuda")
            )
    with pytest.raises(UserError, match="--out: got .* is a file"):
        check_folder(tmp_path / "file" / "out", "--out")


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, tiny_model, capsys):
    flags = [
        "--model",
        str(tiny_model),
        "--out",
        str(tmp_path / "out"),
        "--data",
        str(tmp_path / "no.csv"),
    ]
    assert main(["demo", *FLAGS, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("reft_train demo: error: --data: got ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_specs_are_made_canonical():
    parsed = parse("--positions", "L7 + f7", "--layers", "3,1")
    assert (parsed.positions, parsed.layers) == ("f7+l7", [1, 3])
    assert parse("--positions", "prompt").positions == "all"


def test_help_does_not_need_torch():
    code = (
        "import sys; sys.modules['torch'] = None; from reft_train.__main__ import main; "
        "main(['demo', '--help'])"
    )
    paths = os.pathsep.join(sys.path)
    command, environment = [sys.executable, "-c", code], {"PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and "--positions" in done.stdout, done.stderr


def test_the_two_loreft_trainings_coincide(tiny_model, library, tmp_path):
    dataset = load_stdlib(tmp_path / "cache", library)
    flags = ["--model", tiny_model, *FLAGS, "--positions", "f3+l3", "--lr", "1e-2"]
    settings = demo.resolve_settings(parse(*flags))
    data = encode(
        load_tokenizer(Path(settings.model)), dataset.train, dataset.labels, settings.max_length
    )
    runs, counts = {}, {}
    for name in VARIANTS:
        variant = build(name, settings, len(dataset.labels))
        counts[name] = (variant.edit_count, variant.head_count)
        runs[name] = training.train(variant, data, settings).losses
    assert counts[TORCH] == counts[KERNELS] == (2 * (2 * 24 * 2 + 2), 3 * 24 + 3)
    assert runs[TORCH] == pytest.approx(runs[KERNELS], abs=2e-5)
    assert (
        runs["frozen"][0] == pytest.approx(runs[KERNELS][0], abs=1e-5)
        and runs["frozen"] != runs[KERNELS]
    )


def test_whole_run_on_a_tiny_model(tiny_model, library, tmp_path, capsys):
    dataset = load_stdlib(tmp_path / "cache", library)
    settings = demo.resolve_settings(parse("--model", tiny_model, *FLAGS))
    out = tmp_path / "out"
    for _ in range(2):  # the second replaces what the first wrote
        assert experiment.run_demo(settings, dataset, out, isolate=False) == 0
    printed = capsys.readouterr().out
    assert (
        "predictions bit-identical" in printed
        and "LoReFT, reft_kernels" in printed
        and "step / frozen" in printed
    )
    assert sorted(os.listdir(out)) == ["adapter", "loss.png", "report.html", "results.json"]
    assert {"adapter_config.json", "adapter_model.safetensors", "labels.json"} <= set(
        os.listdir(out / "adapter")
    )
    assert [r["name"] for r in json.loads((out / "results.json").read_text())["results"]] == list(
        VARIANTS
    )


def test_an_adapter_that_does_not_come_back_the_same_is_reported(
    tiny_model, library, tmp_path, capsys, monkeypatch
):
    dataset = load_stdlib(tmp_path / "cache", library)
    settings = demo.resolve_settings(parse("--model", tiny_model, *FLAGS))
    monkeypatch.setattr(experiment, "load_reft", lambda model, folder: model)  # forgets the adapter
    assert experiment.run_demo(settings, dataset, tmp_path / "out", isolate=False) == 1
    assert "FAILED: the reloaded adapter" in capsys.readouterr().out


def test_a_process_of_its_own_trains_the_same(tiny_model, library, tmp_path, capfd):
    dataset = load_stdlib(tmp_path / "cache", library)
    settings = demo.resolve_settings(parse("--model", tiny_model, *FLAGS, "--threads", 1))
    here = worker.run_variant(KERNELS, settings, dataset, tmp_path / "here")
    there = worker.run_isolated(KERNELS, settings, dataset, tmp_path / "there")
    assert there.losses == here.losses and there.accuracy == here.accuracy
    assert there.memory.peak > there.memory.before > 0
    assert "LoReFT, reft_kernels" in capfd.readouterr().err  # its progress bar


def test_a_process_that_fails_is_reported(tiny_model, library, tmp_path, capfd):
    dataset = load_stdlib(tmp_path / "cache", library)
    settings = demo.resolve_settings(parse("--model", tiny_model, *FLAGS))
    broken = replace(settings, model=str(tmp_path / "gone"))
    with pytest.raises(
        RuntimeError, match="LoReFT, reft_kernels: its process ended with exit code 1"
    ):
        worker.run_isolated(KERNELS, broken, dataset, tmp_path / "there")
    assert "gone" in capfd.readouterr().err
