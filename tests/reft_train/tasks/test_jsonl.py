"""A user's own rows, in three layouts."""

from __future__ import annotations

import pytest
from reft_train import tasks
from reft_train.data.tokenizing import Encoder
from reft_train.errors import UserError
from reft_train.tasks.base import Row
from reft_train.tasks.instruct import alpaca

from tests.reft_train.tiny import tokenizer_of

WHERE = "line 4 of own.jsonl"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}[{{ m.role }}] {{ m.content }}\n{% "
    "endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": " Hello. "}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tokenizer_of("llama")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def example(fields: dict, tokenizer=None):
    return tasks.get("jsonl").example(Row(fields, WHERE), tokenizer)


def test_instruction_and_output_take_alpacas_prompt():
    found = example({"instruction": "Add.", "input": "2, 2", "output": "4\n"})
    assert (found.prompt, found.target, found.answer) == (alpaca("Add.", "2, 2"), "4\n", "4")


def test_prompt_and_completion_are_taken_as_they_are():
    found = example({"prompt": "Q: 2 + 2\nA:", "completion": " 4\n", "instruction": "ignored"})
    assert (found.prompt, found.target, found.answer) == ("Q: 2 + 2\nA:", " 4\n", "4")


def test_messages_take_the_chat_template_and_the_last_is_the_target(tokenizer):
    found = example(
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                USER,
                ASSISTANT,
                USER,
                ASSISTANT,
            ]
        },
        tokenizer,
    )
    assert (
        found.prompt
        == "<s>[system] Be brief.\n[user] Hi?\n[assistant]  Hello. \n[user] Hi?\n[assistant] "
    )
    assert (found.target, found.answer) == (" Hello. ", "Hello.")


def test_the_prompt_read_back_starts_with_one_start_token(tokenizer):
    prompt = example({"messages": [USER, ASSISTANT]}, tokenizer).prompt
    (ids,) = Encoder(tasks.get("jsonl"), tokenizer, "causal", 99).prompts([prompt], 99)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_a_start_token_that_only_the_template_writes_is_kept():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of("llama")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A", pair="$A $B", special_tokens=[]
    )
    tokenizer.chat_template = TEMPLATE
    found = example({"messages": [USER, ASSISTANT]}, tokenizer)
    assert found.prompt == "<s>[user] Hi?\n[assistant] "
    assert tokenizer(found.prompt)["input_ids"].count(tokenizer.bos_token_id) == 1


def test_every_turn_is_a_row_to_train(tokenizer):
    task = tasks.get("jsonl")
    row = Row({"messages": [ASSISTANT, USER, ASSISTANT, USER, ASSISTANT, USER], "id": 7}, WHERE)
    rows = task.training_rows(row)
    assert [len(part.fields["messages"]) for part in rows] == [3, 5]
    assert [part.where for part in rows] == [f"{WHERE}, turn 1", f"{WHERE}, turn 2"]
    assert [part.fields["id"] for part in rows] == [7, 7]
    assert task.example(rows[1], tokenizer).prompt.startswith(
        task.example(rows[0], tokenizer).prompt
    )
    for fields in ({"messages": [USER, ASSISTANT]}, {"prompt": "a", "completion": "b"}):
        assert task.training_rows(Row(fields, WHERE)) == [Row(fields, WHERE)]


@pytest.mark.parametrize("messages", [[USER, USER], [ASSISTANT, USER]])
def test_a_conversation_without_an_answer_is_named(messages):
    with pytest.raises(
        UserError, match="line 4 of own.jsonl: messages: got no 'assistant' message after another"
    ):
        tasks.get("jsonl").training_rows(Row({"messages": messages}, WHERE))


@pytest.mark.parametrize(
    "given", [None, tokenizer_of("llama")], ids=["no tokenizer", "no template"]
)
def test_messages_need_a_chat_template(given):
    with pytest.raises(
        UserError, match="line 4 of own.jsonl: messages: got a tokenizer without a chat template"
    ):
        example({"messages": [USER, ASSISTANT]}, given)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, ASSISTANT, USER], "messages: got role 'user' last, expected 'assistant'"),
        (
            [{"role": "robot", "content": "x"}, ASSISTANT],
            "message 1: role: got 'robot', expected one of system, user, assistant",
        ),
        ([USER, {"role": "assistant", "content": ""}], "message 2: content: got no text"),
        (
            [USER, {"role": "assistant", "contents": "x"}],
            "message 2: got fields role, contents, expected content",
        ),
        (
            [{"role": "user", "content": [{"text": "x"}]}, ASSISTANT],
            "message 1: content: got .*list.*, expected a string",
        ),
        (
            ["Hi?", ASSISTANT],
            "message 1: got 'Hi.' .str., expected an object with role and content",
        ),
        ([ASSISTANT], "messages: got .*, expected a list of at least two"),
        ("Hi?", "messages: got 'Hi.' .str., expected a list of at least two"),
        (
            [USER, {"role": "system", "content": "x"}, ASSISTANT],
            r"template rejects \(system comes first\)",
        ),
    ],
)
def test_a_chat_that_cannot_be_learned_is_named(messages, message, tokenizer):
    with pytest.raises(
        UserError, match=f"line 4 of own.jsonl: .*{message}|line 4 of own.jsonl: {message}"
    ):
        example({"messages": messages}, tokenizer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"promt": "a", "completion": "b"}, "got fields promt, completion, expected prompt"),
        ({"instruction": "a", "outptu": "b"}, "got fields instruction, outptu, expected output"),
        (
            {"text": "a"},
            "got fields text, expected messages, or prompt and completion, or instruction and "
            "output",
        ),
        ({}, "got fields none, expected messages"),
        ({"prompt": " ", "completion": "b"}, "prompt: got no text"),
        ({"prompt": "a", "completion": 4}, "completion: got 4 .int., expected a string"),
        ({"instruction": "", "output": "b"}, "instruction: got no text"),
    ],
)
def test_a_bad_row_is_named(fields, message):
    with pytest.raises(UserError, match=f"line 4 of own.jsonl: {message}"):
        example(fields)


@pytest.mark.parametrize(
    ("generated", "prediction", "right"),
    [("Paris\n", "Paris", True), ("paris", "paris", False), (" ", None, False)],
)
def test_the_whole_text_must_match(generated, prediction, right):
    scored = tasks.get("jsonl").score(
        generated, example({"prompt": "Capital?", "completion": " Paris"})
    )
    assert (scored.prediction, scored.right) == (prediction, right)
