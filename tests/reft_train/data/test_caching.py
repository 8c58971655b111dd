"""Tokenized data on disk: made once, and named by everything they depend on."""

from __future__ import annotations

import multiprocessing

import pytest
from reft_train.data.tokenizing import cached, tokenizer_digest
from reft_train.errors import UserError

from tests.reft_train.tiny import tokenizer_of

datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")

PARTS = {"task": "boolq", "max_length": 512}
ROWS = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3], "labels": [3]}]


class _Items:
    """Counts how often the rows are made."""

    def __init__(self, rows=ROWS):
        self.rows, self.calls = rows, 0

    def __call__(self):
        self.calls += 1
        return iter(self.rows)


def rows_of(items, folder=None, parts=PARTS):
    return list(cached(items, parts, folder))


def test_data_are_made_once_and_read_back(tmp_path):
    items = _Items()
    assert [rows_of(items, tmp_path) for _ in range(2)] == [ROWS, ROWS]
    assert items.calls == 1


def test_data_are_read_from_disk(tmp_path):
    assert cached(_Items(), PARTS, tmp_path).cache_files


@pytest.mark.parametrize("other", [{"max_length": 256}, {"task": "piqa"}, {"added": None}])
def test_other_parts_are_other_data(tmp_path, other):
    rows_of(_Items(), tmp_path)
    items = _Items([{"input_ids": [9], "labels": [9]}])
    assert rows_of(items, tmp_path, PARTS | other) == items.rows


def test_the_order_of_parts_does_not_matter(tmp_path):
    items = _Items()
    for parts in (PARTS, dict(reversed(PARTS.items()))):
        rows_of(items, tmp_path, parts)
    assert items.calls == 1


@pytest.mark.parametrize("size", [0, 0.5])
def test_a_damaged_file_is_refused_by_its_place(tmp_path, size):
    rows_of(_Items(), tmp_path)
    (file,) = tmp_path.rglob("*.arrow")
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * size)])
    with pytest.raises(UserError, match=f"cache: got {tmp_path}/reft-train-.*can be deleted"):
        rows_of(_Items(), tmp_path)


def test_an_interrupted_build_is_made_again(tmp_path):
    def stop():
        yield ROWS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rows_of(stop, tmp_path)
    assert rows_of(_Items(), tmp_path) == ROWS


def test_bad_input_in_a_row_is_the_error(tmp_path):
    def refuse():
        yield ROWS[0]
        raise UserError("row 2: got nothing, expected text")

    with pytest.raises(UserError, match="row 2"):
        rows_of(refuse, tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cache: got .*which cannot be read or written"):
        rows_of(_Items(), blocked)


def test_the_default_folder_is_that_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rows_of(_Items())
    assert len(list(tmp_path.glob("reft-train-*"))) == 1


def _cache_at_once(folder, barrier, answers):
    barrier.wait(60)
    answers.put(rows_of(_Items(), folder))


def test_processes_at_once_do_not_break_one_another(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_cache_at_once, args=(tmp_path, barrier, answers)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    assert [answers.get(timeout=60) for _ in processes] == [ROWS] * 3
    for process in processes:
        process.join(60)
    items = _Items()
    assert rows_of(items, tmp_path) == ROWS and items.calls == 0


def test_a_tokenizers_digest_survives_its_use_and_being_saved(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tokenizer_of("bert")
    before = tokenizer_digest(tokenizer)
    tokenizer(["what", "what is"], truncation=True, max_length=4, padding=True)
    assert tokenizer_digest(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    loaded = [tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path)) for _ in range(2)]
    assert loaded[0] == loaded[1]


def _template(tokenizer):
    tokenizer.chat_template = "{{ messages }}"


def _added(tokenizer):
    tokenizer.add_tokens(["<step>"])


def _pad(tokenizer):
    tokenizer.pad_token = "</s>"


def _processor(tokenizer):
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()


@pytest.mark.parametrize("change", [_template, _added, _pad, _processor])
def test_a_changed_tokenizer_has_another_digest(change):
    tokenizer = tokenizer_of("llama")
    before = tokenizer_digest(tokenizer)
    change(tokenizer)
    assert tokenizer_digest(tokenizer) != before


def test_a_tokenizer_in_python_has_a_digest_too(tmp_path):
    from transformers import CanineTokenizer

    one, two = CanineTokenizer(), CanineTokenizer()
    assert tokenizer_digest(one) == tokenizer_digest(two)
    two.chat_template = "{{ messages }}"
    assert tokenizer_digest(one) != tokenizer_digest(two)
