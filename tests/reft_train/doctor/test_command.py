"""The command tells what is there, refuses bad input, and ends with 1 where memory or trial say
so.
"""

from __future__ import annotations

import json
import math

import pytest
from reft_train.__main__ import main
from reft_train.doctor import command, trial
from reft_train.doctor.command import Memory, memory_of

SMALL = ["--task", "gsm8k", "--batch-size", "2", "--max-length", "16", "--device", "cpu"]


def _strict(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_without_a_model_it_tells_what_is_installed(tmp_path, capsys):
    assert main(["doctor", "--json", str(tmp_path / "found.json")]) == 0
    text, found = capsys.readouterr().out, _strict(tmp_path / "found.json")
    assert list(found) == ["environment"]
    for name, version in found["environment"]["packages"].items():
        assert f"  {name:<14}{version}" in text
    backends = found["environment"]["backends"]["cpu"]
    assert set(backends["serving"]["edit"]) == {"float32", "bfloat16", "float16", "float64"}
    assert all(f"off: {reason}" in text for reason in backends["off"].values())


@pytest.mark.parametrize("method", ["loreft", "lora"])
def test_a_model_is_estimated_and_tried(tiny_llama, tmp_path, capsys, method):
    path = tmp_path / "found.json"
    flags = ["--trial-steps", "2", "--method", method, "--json", str(path)]
    assert main(["doctor", "--model", str(tiny_llama), *SMALL, *flags]) == 0
    found = _strict(path)
    tried = found["trial"]
    assert found["verdict"].startswith("fits") and tried["failure"] is None
    assert "  passed" in capsys.readouterr().out
    outcome = tried["outcome"]
    assert outcome["steps"] == 3 and all(math.isfinite(loss) for _, loss in outcome["losses"])
    assert tried["ratio"] == pytest.approx(outcome["step_seconds"] / tried["frozen_seconds"])
    assert outcome["memory"]["peak"] > 0
    assert (outcome["orthonormality"] is None) == (method == "lora")


@pytest.mark.parametrize(
    "folder, task", [("tiny_t5", "gsm8k"), ("tiny_bert", "glue/cola"), ("tiny_bert", "glue/stsb")]
)
def test_other_architectures_are_tried_too(request, folder, task):
    flags = ["--trial-steps", "1", "--gradient-checkpointing"]
    assert (
        main(
            [
                "doctor",
                "--model",
                str(request.getfixturevalue(folder)),
                *SMALL,
                "--task",
                task,
                *flags,
            ]
        )
        == 0
    )


def test_no_trial_where_none_is_wanted(tiny_llama, tmp_path):
    path = tmp_path / "found.json"
    assert (
        main(
            [
                "doctor",
                "--model",
                str(tiny_llama),
                *SMALL,
                "--trial-steps",
                "0",
                "--json",
                str(path),
            ]
        )
        == 0
    )
    assert "trial" not in _strict(path) and _strict(path)["estimate"]["length"] == 16


def test_a_length_that_the_model_does_not_read_is_cut_and_told(tiny_llama, capsys):
    assert (
        main(
            [
                "doctor",
                "--model",
                str(tiny_llama),
                *SMALL,
                "--max-length",
                "4096",
                "--trial-steps",
                "0",
            ]
        )
        == 0
    )
    assert "the model reads 512 tokens, fewer than --max-length 4096" in capsys.readouterr().out


def test_too_little_memory_for_the_weights_ends_with_1_and_a_hint(tiny_llama, monkeypatch, capsys):
    monkeypatch.setattr(command, "memory_of", lambda *a, **k: Memory(10, 20, "a test"))
    assert main(["doctor", "--model", str(tiny_llama), *SMALL]) == 1
    text = capsys.readouterr().out
    assert "does not fit: " in text and "hint: --quantization" in text and "trial:" not in text


def test_a_loss_that_is_not_finite_fails_the_trial(tiny_llama, tmp_path, capsys):
    path = tmp_path / "found.json"
    flags = ["--trial-steps", "1", "--json", str(path), "--lr", "1e30", "--warmup", "0"]
    assert main(["doctor", "--model", str(tiny_llama), *SMALL, *flags]) == 1
    assert "FAILED: FloatingPointError: the loss is nan at step 2" in capsys.readouterr().out
    assert _strict(path)["trial"]["outcome"] is None


def test_an_error_in_a_step_fails_the_trial_in_a_line(tiny_llama, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(trial, "train", fail)
    assert main(["doctor", "--model", str(tiny_llama), *SMALL]) == 1
    assert "FAILED: RuntimeError: out of memory\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--task", "gsm8k"], "--model: got none with --task"),
        (["--batch-size", "4"], "--model: got none with --batch-size"),
        (["--model", "/no/such/model", "--task", "gsm8k"], "model: got '/no/such/model'"),
        (["--json", "."], "--json: got ., which is a folder"),
    ],
)
def test_bad_input_is_refused_in_a_line(flags, named, capsys):
    assert main(["doctor", *flags]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def test_a_model_without_weights_or_tokenizer_is_bad_input(tiny_llama, tmp_path, capsys):
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    assert main(["doctor", "--model", str(tmp_path), *SMALL]) == 2
    assert "whose tokenizer cannot be loaded" in capsys.readouterr().err


def test_a_control_group_s_limit_counts(monkeypatch, tmp_path):
    (tmp_path / "max").write_text("512000\n")
    (tmp_path / "now").write_text("500000\n")
    monkeypatch.setattr(command, "_GROUPS", ((tmp_path / "max", tmp_path / "now"),))
    assert memory_of("cpu") == Memory(12_000, 512_000, "the control group's limit")
    (tmp_path / "max").write_text("max\n")
    assert memory_of("cpu").source == "system memory"
    assert 0 < memory_of("cpu").free <= memory_of("cpu").total
