"""``reft-train chat``: piped lines, its commands, several turns, and bad input."""

from __future__ import annotations

import io

import pytest
import torch
import transformers
from peft import get_peft_model
from reft_train import chat
from reft_train.__main__ import main
from reft_train.methods import save_adapter

from reft_kernels.integrations.peft import ReftConfig, from_chat_template
from tests.reft_train.tiny import shake


@pytest.fixture(scope="module")
def adapter(chat_model, tmp_path_factory):
    """A saved adapter that changes what the model says."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(chat_model)
    template = from_chat_template(tokenizer)
    config = ReftConfig(
        task_type="CAUSAL_LM", rank=4, positions="f2+l2", response_template=template
    )
    torch.manual_seed(0)
    model = shake(get_peft_model(model, config), 3.0).eval()
    folder = tmp_path_factory.mktemp("chat") / "adapter"
    save_adapter(model, folder)
    return folder, model, tokenizer


def talk(lines, folder, capsys, monkeypatch, *flags):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    code = main(["chat", "--adapter", str(folder), "--max-new-tokens", "6", *flags])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def expected(model, tokenizer, messages):
    """The greedy answer, from whole forwards that are told the prompt's length."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    start = len(ids)
    with torch.no_grad():
        for _ in range(6):
            logits = model(input_ids=torch.tensor([ids]), prompt_lengths=[start]).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_each_turn_edits_the_prompt_of_the_whole_conversation(adapter, capsys, monkeypatch):
    folder, model, tokenizer = adapter
    questions = ["Name a fruit", "the answer is", "yes"]
    printed = talk([*questions, "/quit", "unread"], folder, capsys, monkeypatch)
    messages = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        answer = expected(model, tokenizer, messages)
        assert answer and answer in printed
        messages.append({"role": "assistant", "content": answer})
    assert printed.count("with LoReFT") == 3


def test_the_base_the_adapter_and_a_reset(adapter, capsys, monkeypatch):
    folder, model, tokenizer = adapter
    lines = ["/base", "Name a fruit", "/reset", "/adapter", "Name a fruit", "/what"]
    printed = talk(lines, folder, capsys, monkeypatch)
    ask = [{"role": "user", "content": "Name a fruit"}]
    with model.disable_adapter():
        frozen = expected(model, tokenizer, ask)
    edited = expected(model, tokenizer, ask)
    assert frozen != edited
    base, _, after = printed.partition("with LoReFT")
    assert frozen in base and edited in after and edited not in base
    assert "/what: unknown" in printed


def test_the_end_of_the_input_ends_the_chat(adapter, capsys, monkeypatch):
    assert "/reset" in talk([], adapter[0], capsys, monkeypatch)


def test_a_conversation_that_does_not_fit_is_said_and_left_out(adapter, capsys, monkeypatch):
    folder, model, tokenizer = adapter
    long = "the answer is yes " * 2000
    printed = talk([long, "Name a fruit"], folder, capsys, monkeypatch)
    assert "expected 2048 in all: /reset" in " ".join(printed.split())
    assert expected(model, tokenizer, [{"role": "user", "content": "Name a fruit"}]) in printed


def test_sampling_depends_on_the_seed_alone(adapter, capsys, monkeypatch):
    flags = ("--temperature", "1.5", "--seed")
    said = [talk(["Name a fruit"], adapter[0], capsys, monkeypatch, *flags, s) for s in "117"]
    assert said[0] == said[1] != said[2]


def test_bad_input_is_one_line(adapter, chat_model, tmp_path, capsys):
    folder = str(adapter[0])
    for flags, message in (
        (["--adapter", str(tmp_path)], "--adapter: got"),
        (["--adapter", "none"], "--adapter: got none"),
        (["--adapter", folder, "--model", str(tmp_path)], "model: got"),
        (["--adapter", folder, "--temperature", "-1"], "temperature: got '-1'"),
    ):
        assert main(["chat", *flags]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_answer_is_the_streamed_text(adapter, capsys):
    _, model, tokenizer = adapter
    answer = chat.reply(model, tokenizer, [{"role": "user", "content": "yes"}], 5, do_sample=False)
    assert capsys.readouterr().out.strip() == answer.strip()
