"""Where a task's files are looked for, and what is said when they are not there."""

from __future__ import annotations

import pytest
from reft_train import tasks
from reft_train.data.reading import find
from reft_train.errors import UserError
from reft_train.tasks.llm_adapters import COMMONSENSE as SETS

from tests.reft_train.real_data import data_folder, needs


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[]")
    return paths[0]


def test_named_files_win_over_the_folder(tmp_path):
    touch(tmp_path / "boolq" / "train.json", tmp_path / "boolq" / "test.json")
    train, test = touch(tmp_path / "mine.csv"), touch(tmp_path / "held.jsonl")
    assert find(tasks.get("boolq"), tmp_path, train, [test]) == (train, {"held": test})


def test_what_is_not_named_comes_from_the_folder(tmp_path):
    train, test = touch(tmp_path / "boolq" / "train.json"), touch(tmp_path / "boolq" / "test.json")
    mine = touch(tmp_path / "mine.csv")
    assert find(tasks.get("boolq"), tmp_path, mine) == (mine, {"boolq": test})
    assert find(tasks.get("boolq"), tmp_path, tests=[mine]) == (train, {"mine": mine})


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_a_set_is_found_in_its_folder_or_as_the_folder(suffix, tmp_path):
    train = touch(tmp_path / "piqa" / f"train{suffix}")
    test = touch(tmp_path / "piqa" / f"test{suffix}")
    assert (
        find(tasks.get("piqa"), tmp_path)
        == find(tasks.get("piqa"), tmp_path / "piqa")
        == (train, {"piqa": test})
    )


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("commonsense", "commonsense_170k.json"),
        ("commonsense", "commonsense_170k/train.json"),
        ("math", "math_10k.json"),
        ("math", "math_10k/train.jsonl"),
        ("instruct", "alpaca_data_cleaned.json"),
        ("instruct", "alpaca_data_cleaned/train.json"),
        ("math", "train.json"),
    ],
)
def test_a_mixtures_training_file(name, place, tmp_path):
    train = touch(tmp_path / place)
    assert find(tasks.get(name), tmp_path) == (train, {})


def test_a_mixture_is_tested_on_the_sets_that_are_there(tmp_path):
    boolq, piqa = touch(tmp_path / "boolq" / "test.json"), touch(tmp_path / "piqa.jsonl")
    touch(tmp_path / "gsm8k" / "test.json")
    found = find(tasks.get("commonsense"), tmp_path, train_needed=False)
    assert found == (None, {"boolq": boolq, "piqa": piqa})


@pytest.mark.parametrize("name", ["instruct", "jsonl", "math"])
def test_a_plain_pair_of_files_serves_any_task(name, tmp_path):
    train, test = touch(tmp_path / "train.jsonl"), touch(tmp_path / "test.jsonl")
    found = find(tasks.get(name), tmp_path, tests_needed=True)
    assert (found[0], list(found[1].values())) == (train, [test])


@pytest.mark.parametrize(("name", "split"), [("rte", "validation"), ("mnli", "validation_matched")])
@pytest.mark.parametrize("ending", [".parquet", ".tsv", "-00000-of-00001.parquet"])
def test_glue_in_a_folder(name, split, ending, tmp_path):
    train, validation = (
        touch(tmp_path / name / f"train{ending}"),
        touch(tmp_path / name / f"{split}{ending}"),
    )
    touch(tmp_path / name / "test.parquet")
    expected = (train, {split: validation})
    assert (
        find(tasks.get(f"glue/{name}"), tmp_path)
        == find(tasks.get(f"glue/{name}"), tmp_path / name)
        == expected
    )


def test_named_test_files_take_their_sets_names(tmp_path):
    paths = [
        touch(tmp_path / place)
        for place in ("boolq/test.json", "piqa.json", "a/own.json", "b/own.json", "x/test.json")
    ]
    found = find(tasks.get("commonsense"), tests=paths, train_needed=False)[1]
    assert list(found) == ["boolq", "piqa", "own", str(paths[3]), "test"]
    assert list(found.values()) == paths


def test_a_test_file_named_three_times_is_an_error(tmp_path):
    path = touch(tmp_path / "own.json")
    with pytest.raises(UserError, match="--test: got .*own.json twice"):
        find(tasks.get("jsonl"), tests=[path, path, path], train_needed=False)


def test_nothing_found_names_the_places(tmp_path):
    with pytest.raises(UserError) as caught:
        find(tasks.get("commonsense"), tmp_path)
    for place in ("commonsense_170k", "commonsense_170k/train", "train"):
        assert str(tmp_path / place) + (" (" if place == "train" else ",") in str(caught.value)
    with pytest.raises(UserError) as caught:
        find(tasks.get("commonsense"), tmp_path, train_needed=False, tests_needed=True)
    assert all(str(tmp_path / name / "test") in str(caught.value) for name in SETS)


@pytest.mark.parametrize(
    ("options", "argument"),
    [({}, "--train"), ({"train_needed": False, "tests_needed": True}, "--test")],
)
def test_without_a_folder_files_must_be_named(options, argument):
    with pytest.raises(
        UserError,
        match=f"{argument}: got nothing for task boolq, expected a file, or a folder with --data",
    ):
        find(tasks.get("boolq"), **options)


def test_what_is_not_needed_may_be_missing(tmp_path):
    assert find(tasks.get("boolq"), tmp_path, train_needed=False) == (None, {})


def test_two_files_for_one_set_are_an_error(tmp_path):
    touch(tmp_path / "boolq" / "train.json", tmp_path / "boolq" / "train.csv")
    with pytest.raises(
        UserError, match="--data: got both .*train.json and .*train.csv, expected one of them"
    ):
        find(tasks.get("boolq"), tmp_path)


def test_the_data_folder_must_be_one(tmp_path):
    with pytest.raises(UserError, match="--data: got .*none, which is missing, expected a folder"):
        find(tasks.get("boolq"), tmp_path / "none")
    with pytest.raises(
        UserError, match=r"--data: got .*a.json, which is a file \(use --train and --test\)"
    ):
        find(tasks.get("boolq"), touch(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("argument", "options"), [("--train", {"train": "x.json"}), ("--test", {"tests": ["x.json"]})]
)
def test_a_named_file_must_exist(argument, options):
    with pytest.raises(UserError, match=f"{argument}: got x.json, which does not exist"):
        find(tasks.get("boolq"), **options)


@needs(
    "boolq/train.json",
    "boolq/test.json",
    "piqa/test.json",
    "gsm8k/test.json",
    "SVAMP/test.json",
    "AQuA/test.json",
)
def test_the_published_layout():
    assert find(tasks.get("boolq"), data_folder())[0] == data_folder() / "boolq" / "train.json"
    assert {"boolq", "piqa"} <= set(
        find(tasks.get("commonsense"), data_folder(), train_needed=False)[1]
    )
    assert {"gsm8k", "SVAMP", "AQuA"} <= set(
        find(tasks.get("math"), data_folder(), train_needed=False)[1]
    )
