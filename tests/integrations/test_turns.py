"""expand_turns: one row per response, for messages and tokens, batches, examples and data sets."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from reft_kernels.integrations.peft import ReftConfig
from reft_kernels.integrations.turns import expand_turns
from tests.model.families import make, shake

datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")


def conversation(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]


TALK = conversation("system", "user", "assistant", "user", "assistant", "user")
TOKENS = {
    "input_ids": [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]],
    "labels": [[-100, -100, 3, 4, -100, -100, 7, -100], [-100, -100, -100]],
    "attention_mask": [[1] * 8, [1] * 3],
    "position_ids": [list(range(8)), [0, 1, 2]],
    "source": ["a", "b"],
}


def test_messages():
    batch = {
        "messages": [TALK, conversation("user"), conversation("user", "assistant")],
        "id": [0, 1, 2],
    }
    before = copy.deepcopy(batch)
    rows = expand_turns(batch)
    assert rows["messages"] == [TALK[:3], TALK[:5], conversation("user", "assistant")]
    assert rows["id"] == [0, 0, 2] and batch == before
    again = expand_turns(batch, prompt_completion=True)
    assert "messages" not in again and again["id"] == [0, 0, 2]
    assert again["prompt"][:2] == [TALK[:2], TALK[:4]]
    assert again["completion"] == [[TALK[2]], [TALK[4]], [conversation("user", "assistant")[1]]]


def test_tokens():
    rows = expand_turns(TOKENS)
    assert rows == {
        "input_ids": [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]],
        "labels": [[-100, -100, 3, 4], [-100] * 6 + [7]],
        "attention_mask": [[1] * 4, [1] * 7],
        "position_ids": [list(range(4)), list(range(7))],
        "source": ["a", "a"],
    }
    assert expand_turns(rows) == rows  # rows with one response are unchanged


def test_a_single_example():
    assert expand_turns({"messages": TALK, "id": 3}) == {
        "messages": [TALK[:3], TALK[:5]],
        "id": [3, 3],
    }
    example = {name: column[0] for name, column in TOKENS.items()}
    assert expand_turns(example) == expand_turns(TOKENS)
    tensors = {name: torch.tensor(example[name]) for name in ("input_ids", "labels")}
    assert expand_turns(tensors) == {name: expand_turns(TOKENS)[name] for name in tensors}
    assert expand_turns({"messages": [], "id": []}) == {"messages": [], "id": []}


@pytest.mark.parametrize("batch_size", [1, 2, 1000])
def test_a_data_set(batch_size):
    talks = [conversation("user"), TALK, conversation("user", "assistant")]
    rows = datasets.Dataset.from_dict({"messages": talks, "id": [0, 1, 2]})
    mapped = rows.map(expand_turns, batched=True, batch_size=batch_size)
    assert mapped["id"][:] == [1, 1, 2]
    assert mapped["messages"][:] == [TALK[:3], TALK[:5], conversation("user", "assistant")]
    options = {"fn_kwargs": {"prompt_completion": True}, "remove_columns": "messages"}
    trl = rows.map(expand_turns, batched=True, batch_size=batch_size, **options)
    assert sorted(trl.column_names) == ["completion", "id", "prompt"]
    assert trl["completion"][:2] == [[TALK[2]], [TALK[4]]]
    tokens = datasets.Dataset.from_dict(TOKENS)
    expected = expand_turns(TOKENS)
    for made in (tokens, tokens.with_format("torch"), tokens.to_iterable_dataset()):
        mapped = made.map(expand_turns, batched=True, batch_size=batch_size)
        got = list(mapped.with_format(None))
        assert [row["labels"] for row in got] == expected["labels"]
        assert [row["attention_mask"] for row in got] == expected["attention_mask"]


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ([1], TypeError, r"batch: got list \[1\], expected a dict"),
        (
            {"text": ["a"]},
            ValueError,
            "batch: got columns 'text', expected 'messages', or 'input_ids' and 'labels'",
        ),
        ({"input_ids": [[1]]}, ValueError, "got columns 'input_ids', expected"),
        ({**TOKENS, "messages": [TALK, TALK]}, ValueError, "batch: got columns"),
        ({"messages": "hello"}, TypeError, "messages: got str 'hello', expected a list"),
        ({"messages": [TALK], "id": 1}, TypeError, "id: got int 1, expected a list"),
        (
            {"messages": [TALK], "id": [1, 2]},
            ValueError,
            "id: got 2 rows, expected 1 as 'messages'",
        ),
        ({"messages": ["hello"]}, TypeError, "messages, row 0: got str 'hello', expected a list"),
        ({"messages": [["hello"]]}, TypeError, "messages, row 0, message 0: got str 'hello'"),
        (
            {"messages": [[{"from": "gpt"}]]},
            ValueError,
            "message 0: got keys 'from', expected 'role'",
        ),
        (
            {"input_ids": [[1, 2]], "labels": [[1]]},
            ValueError,
            "labels, row 0: got 1 for 2 input_ids",
        ),
        ({"input_ids": [["a"]], "labels": [[1]]}, TypeError, "input_ids, row 0: got str 'a' in it"),
        (
            {"input_ids": [[1]], "labels": [3]},
            TypeError,
            "labels, row 0: got int 3, expected a list",
        ),
        (
            {"input_ids": [[1, 2, 3]], "labels": [[-100, 2, 3]], "position_ids": [[0, 1, 0]]},
            ValueError,
            "position_ids, row 0: got several sequences",
        ),
        ({**TOKENS, "seq_lengths": [[8], [3]]}, ValueError, "packed rows"),
    ],
)
def test_wrong_input(batch, error, message):
    with pytest.raises(error, match=message):
        expand_turns(batch)


def test_prompt_completion_needs_messages():
    with pytest.raises(ValueError, match="prompt_completion: got True"):
        expand_turns(TOKENS, prompt_completion=True)
    with pytest.raises(ValueError, match="got column 'prompt' beside 'messages'"):
        expand_turns({"messages": [TALK], "prompt": ["a"]}, prompt_completion=True)


def test_padding_counts_its_position_ids_from_anywhere():
    row = {
        "input_ids": [[0, 0, 5, 6]],
        "labels": [[-100, -100, -100, 6]],
        "attention_mask": [[0, 0, 1, 1]],
    }
    assert expand_turns({**row, "position_ids": [[1, 1, 0, 1]]})["labels"] == row["labels"]


@pytest.mark.parametrize("positions", ["f2+l2", "prompt", "l1"])
def test_training_edits_what_generation_edits(positions):
    config = ReftConfig(rank=4, positions=positions, task_type="CAUSAL_LM")
    model = get_peft_model(make("llama"), config)
    shake(model)
    ids = torch.randint(3, 80, (14,), generator=torch.Generator().manual_seed(5)).tolist()
    labels = [-100] * 4 + ids[4:7] + [-100] * 3 + ids[10:12] + [-100] * 2
    with pytest.raises(ValueError, match="expand_turns"):
        model.train()(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
    rows = expand_turns({"input_ids": [ids], "labels": [labels]})
    assert [len(row) for row in rows["input_ids"]] == [7, 12]
    for row, label, prompt in zip(rows["input_ids"], rows["labels"], (4, 10), strict=True):
        tokens = torch.tensor([row])
        trained = model.train()(input_ids=tokens, labels=torch.tensor([label]))
        assert trained.loss.requires_grad
        model.eval()
        with torch.no_grad():
            explicit = model(input_ids=tokens, prompt_lengths=[prompt]).logits
        assert torch.equal(trained.logits, explicit)
        generated = model.generate(
            input_ids=tokens[:, :prompt],
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        torch.testing.assert_close(generated.logits[0], explicit[:, prompt - 1])
