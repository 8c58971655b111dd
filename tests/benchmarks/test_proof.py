"""Tests of the end-to-end scripts with few rows and steps."""

from __future__ import annotations

import pytest

from tests.reft_train.real_data import data_folder, needs

pytestmark = [pytest.mark.full, pytest.mark.slow]


@needs("gsm8k/test.json")
def test_the_causal_proof_trains_interrupts_resumes_and_scores(tmp_path):
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    from benchmarks.proof.causal import prove

    results = prove(
        data_folder(),
        tmp_path,
        rows=2,
        seconds=3,
        settings=["--max-steps", "30", "--max-new-tokens", "8"],
    )
    assert results["resumed_losses_are_the_uninterrupted_ones"] and results["steps"] == 30
    assert results["last_loss"] < results["first_loss"]
    assert set(results["loreft"]) == set(results["frozen"]) == {"accuracy", "exact_text"}


@needs("piqa/test.json", "SVAMP/test.json", "AQuA/test.json", "boolq/test.json")
def test_the_chat_model_proof_splits_rows_once():
    from benchmarks.proof.chat_model import SIZES, split

    for task, (train_size, test_size) in SIZES.items():
        train, test = split(data_folder() / task, task)
        assert len(test) == test_size and train_size / 2 <= len(train) <= train_size
        assert not {row["instruction"] for row in train} & {row["instruction"] for row in test}
        assert (train, test) == split(data_folder() / task, task)


@needs("piqa/test.json")
def test_the_chat_model_proof_scores_compares_and_resumes(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    from benchmarks.proof import chat_model
    from benchmarks.proof.stdlib_llama import train_llama

    monkeypatch.setitem(chat_model.SIZES, "piqa", (12, 4))
    monkeypatch.setattr(chat_model, "SEEDS", (1, 2))
    train_llama(tmp_path / "base", 3)
    options = ["--max-steps", "2", "--max-length", "128"]
    arguments = ("piqa", tmp_path / "base", data_folder(), tmp_path / "out", "float32", 1, options)
    results = chat_model.prove(*arguments)
    assert [row["method"] for row in results["methods"]] == list(chat_model.METHODS)
    assert len(results["runs"]) == 8 and len(results["frozen"]) == 2
    trials = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("results.json")}
    again = chat_model.prove(*arguments)
    assert again["methods"] == results["methods"]
    assert trials == {path: path.stat().st_mtime_ns for path in trials}
