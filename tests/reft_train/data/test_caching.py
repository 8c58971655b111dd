"""Tokenized data on disk: made once, named by everything they depend on, and made again where
they are damaged.
"""

from __future__ import annotations

import multiprocessing
import warnings

import pytest
from reft_train.data import caching
from reft_train.data.caching import cached, tokenizer_digest

from tests.reft_train.tiny import tokenizer_of

datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")

PARTS = {"task": "boolq", "max_length": 512}
ROWS = {"input_ids": [[1, 2], [3]], "labels": [[-100, 2], [3]]}


class _Build:
    def __init__(self, rows=ROWS):
        self.rows, self.calls = rows, 0

    def __call__(self):
        self.calls += 1
        return datasets.Dataset.from_dict(self.rows)


def test_data_are_made_once_and_read_back(tmp_path):
    build = _Build()
    assert [cached(build, PARTS, tmp_path).to_dict() for _ in range(2)] == [ROWS, ROWS]
    assert build.calls == 1
    assert len(list(tmp_path.iterdir())) == 1  # nothing temporary is left


@pytest.mark.parametrize("other", [{"max_length": 256}, {"task": "piqa"}, {"added": None}])
def test_other_parts_are_other_data(tmp_path, other):
    cached(_Build(), PARTS, tmp_path)
    build = _Build({"input_ids": [[9]], "labels": [[9]]})
    assert cached(build, PARTS | other, tmp_path)["input_ids"][0] == [9]


def test_the_order_of_parts_does_not_matter(tmp_path):
    build = _Build()
    for parts in (PARTS, dict(reversed(PARTS.items()))):
        cached(build, parts, tmp_path)
    assert build.calls == 1


DAMAGE = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "emptied": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "dataset_info.json", "state.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_cannot_be_read_is_noticed_and_the_data_made_again(tmp_path, name, damage):
    build = _Build()
    cached(build, PARTS, tmp_path)
    (folder,) = tmp_path.iterdir()
    DAMAGE[damage](folder / name)
    assert cached(build, PARTS, tmp_path).to_dict() == ROWS and build.calls == 2
    assert cached(build, PARTS, tmp_path).to_dict() == ROWS and build.calls == 2


def test_files_that_a_map_puts_beside_the_data_do_no_harm(tmp_path):
    build = _Build()
    cached(build, PARTS, tmp_path).map(
        lambda row: {"length": len(row["input_ids"])}, load_from_cache_file=False
    )
    (folder,) = tmp_path.iterdir()
    assert list(folder.glob("cache-*"))
    cached(build, PARTS, tmp_path)
    assert build.calls == 1


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(caching, "replace_folder", stop)
    with pytest.raises(KeyboardInterrupt):
        cached(_Build(), PARTS, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match="tokenized data are not kept"):
        assert cached(_Build(), PARTS, blocked).to_dict() == ROWS


def test_the_default_folder_is_under_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached(_Build(), PARTS)
    assert len(list((tmp_path / "reft_train" / "tokenized").iterdir())) == 1


def _cache_at_once(folder, barrier, answers):
    def build():
        barrier.wait(60)  # every process found nothing and is building
        return datasets.Dataset.from_dict(ROWS)

    answers.put(cached(build, PARTS, folder).to_dict())


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
    build = _Build()
    cached(build, PARTS, tmp_path)
    assert build.calls == 0 and len(list(tmp_path.iterdir())) == 1


def test_who_loses_the_race_takes_what_the_winner_left(tmp_path, monkeypatch):
    def lose(source, target):
        source.rename(target)  # the winner's folder is there now
        raise OSError("directory not empty")

    monkeypatch.setattr(caching, "replace_folder", lose)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = cached(_Build(), PARTS, tmp_path)
    assert dataset.to_dict() == ROWS and dataset.cache_files  # from disk


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
