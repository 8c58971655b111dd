"""Runs on conversations: a row for each answer, and an adapter that knows where a prompt ends."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
from peft import PeftModel
from reft_train import tasks
from reft_train.config import build, read_yaml
from reft_train.data.tokenizing import Encoder
from reft_train.models import load
from reft_train.training import prepare
from reft_train.training.outcome import Outcome

from reft_kernels.integrations.peft import from_chat_template
from tests.reft_train.runs import instructions, run, write_rows
from tests.tiny_chat import chat_tokenizer, save_chat_model

LONG = {"max_length": 200, "skip_test": True}


def conversations(count: int, turns: int = 2) -> list[dict]:
    rows = []
    for i in range(count):
        messages = []
        for turn in range(turns):
            messages.append({"role": "user", "content": f"Name a fruit {i}"})
            messages.append({"role": "assistant", "content": f"An apple {turn}"})
        rows.append({"messages": messages})
    return rows


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("chat-model"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, chat_model):
    folder = tmp_path_factory.mktemp("chats")
    rows = write_rows(folder / "rows.jsonl", conversations(8))
    assert run(chat_model, folder / "run", train=rows, **LONG) == 0
    return folder / "run"


def encoder_of(config, task):
    loaded = load(config, task)
    return Encoder(task, loaded.tokenizer, loaded.kind, config.max_length)


def kept_template(output):
    return json.loads((output / "adapter" / "adapter_config.json").read_text())["response_template"]


def test_every_answer_is_trained(finished):
    assert Outcome.load(finished).steps == 2  # 16 rows in batches of 4, two to a step


@pytest.mark.parametrize("more", [{}, {"streaming": True, "max_steps": 2, "workers": 1}])
def test_only_the_last_answer_is_trained_where_it_is_wanted(more, chat_model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", conversations(8))
    assert run(chat_model, tmp_path / "run", train=rows, turns="last", **more, **LONG) == 0
    config = build(read_yaml(tmp_path / "run" / "config.yaml"))
    task = tasks.get("jsonl")
    if more:
        stream = prepare.stream(config, encoder_of(config, task), rows)
        assert len({tuple(item["input_ids"]) for item in islice(stream, 400)}) == 8
    else:
        assert Outcome.load(tmp_path / "run").steps == 1
        assert all(
            len(row.fields["messages"]) == 4 for row in prepare.find_rows(config, task).train
        )


def test_a_stream_has_an_item_for_each_answer(chat_model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", conversations(3))
    settings = {"streaming": True, "max_steps": 2, "max_length": 200, "device": "cpu"}
    config = build({"model": str(chat_model), "task": "jsonl", "train": str(rows), **settings})
    task = tasks.get("jsonl")
    stream = prepare.stream(config, encoder_of(config, task), rows)
    # endless: passes over the three conversations of two answers
    assert len({tuple(item["input_ids"]) for item in islice(stream, 400)}) == 6


def test_a_conversation_is_whole_on_one_side_of_the_split(chat_model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", conversations(8))
    config = build({"model": str(chat_model), "task": "jsonl", "train": str(rows), "validation": 2})
    found = prepare.find_rows(config, tasks.get("jsonl"))
    assert (len(found.train), len(found.held_out)) == (12, 4)
    first = [
        {row.fields["messages"][0]["content"] for row in part}
        for part in (found.train, found.held_out)
    ]
    assert not first[0] & first[1]


def test_the_adapter_is_right_without_labels(finished, chat_model):
    tokenizer = chat_tokenizer()
    assert kept_template(finished) == [from_chat_template(tokenizer)]
    config = build(read_yaml(finished / "config.yaml"))
    model = PeftModel.from_pretrained(
        load(config, tasks.get("jsonl")).model, str(finished / "adapter")
    ).eval()
    messages = conversations(1)[0]["messages"]
    ids = tokenizer(
        tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt"
    ).input_ids
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    length = len(tokenizer(prompt).input_ids)
    with torch.no_grad():
        told = model(input_ids=ids, prompt_lengths=[length]).logits
        assert torch.equal(model(input_ids=ids).logits, told)
        assert not torch.equal(model(input_ids=ids, prompt_lengths=[ids.shape[1]]).logits, told)


def test_rows_that_are_no_chats_keep_no_template(chat_model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", instructions(8))
    assert run(chat_model, tmp_path / "run", train=rows, **LONG) == 0
    assert kept_template(tmp_path / "run") is None


@pytest.mark.parametrize(
    ("template", "answer", "reason"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "An apple", "tokenizer: "),
        (None, "An apple<|im_end|>\n<|im_start|>assistant\nYes", "ends inside the answer of"),
    ],
    ids=["bare", "in the answer"],
)
def test_a_template_that_does_not_serve_is_said(template, answer, reason, tmp_path, capsys):
    model = save_chat_model(tmp_path / "model")
    if template is not None:
        tokenizer = chat_tokenizer(template)
        tokenizer.save_pretrained(model)
    talks = conversations(8)
    talks[3]["messages"][-1]["content"] = answer
    rows = write_rows(tmp_path / "rows.jsonl", talks)
    assert run(model, tmp_path / "run", train=rows, **LONG) == 0
    said = capsys.readouterr().err
    assert (
        "response_template: none (" in said and reason in said and "prompt ends from labels" in said
    )
    assert kept_template(tmp_path / "run") is None
