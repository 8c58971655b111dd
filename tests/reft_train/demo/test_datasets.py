"""A user's file: both formats, the split by row, and an error for each thing that can be wrong."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from reft_train.demo.datasets import Dataset, Example, deduplicate, load_file, split_by_row
from reft_train.errors import UserError


def entry(number: int, answer="yes") -> dict:
    return {
        "instruction": f"Question {number}?",
        "input": "",
        "output": "the correct answer is x",
        "answer": answer,
    }


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_llm_adapters_json(tmp_path):
    rows = [entry(n, "true" if n % 2 else ["false"]) for n in range(40)] + [
        {**entry(99, "true"), "input": "More."}
    ]
    dataset = load_file(write(tmp_path / "train.json", rows), seed=0)
    assert dataset.labels == ["false", "true"]
    assert len(dataset.train) + len(dataset.held_out) == 41
    texts = {example.text for example in [*dataset.train, *dataset.held_out]}
    assert "Question 99?\nMore." in texts and "Question 0?" in texts


def test_numbers_are_labels_too(tmp_path):
    dataset = load_file(write(tmp_path / "a.json", [entry(n, n % 3) for n in range(12)]), seed=0)
    assert dataset.labels == ["0", "1", "2"]


def test_csv_with_quoted_newlines_and_more_columns(tmp_path):
    rows = "\n".join(f'{n},"line one of {n}\nline, two",{"ab"[n % 2]}' for n in range(20))
    dataset = load_file(write(tmp_path / "rows.csv", f"\ufeffid,text,label\n{rows}\n"), seed=0)
    assert dataset.labels == ["a", "b"] and len(dataset.train) + len(dataset.held_out) == 20
    assert all("\n" in example.text for example in dataset.train)


def test_split_depends_on_the_seed_alone_and_holds_out_of_each_label():
    examples = [Example(f"text {n}", "abc"[n % 3]) for n in range(60)]
    train, held_out = split_by_row(examples, seed=3)
    assert (train, held_out) == split_by_row(examples, seed=3)
    assert held_out != split_by_row(examples, seed=4)[1]
    assert Counter(e.label for e in held_out) == {"a": 5, "b": 5, "c": 5}
    assert not set(train) & set(held_out) and set(train) | set(held_out) == set(examples)


def test_duplicates_keep_the_first_and_contradictions_go():
    rows = [("A  text", "x"), ("a text", "x"), ("B", "x"), ("b", "y"), ("C", "y")]
    examples = [Example(*row) for row in rows]
    assert deduplicate(examples) == [Example("A  text", "x"), Example("C", "y")]


def test_json_round_trip_and_majority():
    train, held_out = (
        [Example("a", "x", "m"), Example("b", "y")],
        [Example("c", "x"), Example("é", "y")],
    )
    dataset = Dataset(train, held_out, ["x", "y"], "d")
    assert Dataset.from_json(dataset.to_json()) == dataset
    assert dataset.majority_accuracy == 0.5


BAD = {
    "missing file": ("none.csv", None, "no such file"),
    "other ending": ("rows.txt", "text,label", "ends in .json or .csv"),
    "empty file": ("rows.csv", " \n", "is empty"),
    "header alone": ("rows.csv", "text,label\n", "without a row"),
    "missing column": (
        "rows.csv",
        "text,kind\na,b\n",
        r"got columns text, kind .* expected text and label",
    ),
    "empty label": ("rows.csv", "text,label\na,x\nb,\n", "row 2 .* without label"),
    "short row": ("rows.csv", "label,text\nx,a\ny\n", "row 2 .* without text"),
    "one label": ("rows.csv", "text,label\na,x\nb,x\n", "one label, 'x'"),
    "only contradictions": (
        "rows.csv",
        "text,label\na,x\na,y\n",
        "no text that has a single label",
    ),
    "single row of a label": (
        "rows.csv",
        "text,label\na,x\nb,x\nc,y\n",
        "one distinct text labelled 'y'",
    ),
    "not utf-8": ("rows.csv", b"text,label\n\xff\xfe,x\n", "cannot be read"),
    "malformed json": ("rows.json", '[{"instruction"', "not JSON"),
    "json object": ("rows.json", '{"a": 1}', "got a JSON dict .* expected a list"),
    "json of strings": ("rows.json", '["a"]', "entry 1 .* with str"),
    "json without answer": (
        "rows.json",
        '[{"instruction": "q", "output": "o"}]',
        "entry 1 .* instruction, output",
    ),
    "json with empty answer": (
        "rows.json",
        '[{"instruction": "q", "answer": null}]',
        "entry 1 .* without answer",
    ),
    "empty json list": ("rows.json", "[]", "without a row"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_name_the_argument_and_what_came(name, tmp_path):
    file, content, message = BAD[name]
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    elif content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_file(tmp_path / file, seed=0)
    assert str(error.value).startswith("--data: got ") and "expected" in str(error.value)
