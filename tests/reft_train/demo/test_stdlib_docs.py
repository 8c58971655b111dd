"""The docstring corpus: nothing is imported, nothing leaks, and it is the same each time."""

from __future__ import annotations

from collections import Counter

import pytest
from reft_train.demo import stdlib_docs
from reft_train.demo.datasets import normalized
from reft_train.errors import UserError


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return stdlib_docs.load_stdlib(tmp_path_factory.mktemp("cache"))


def test_this_interpreter_has_enough_text(real):
    assert (
        set(real.labels) <= set(stdlib_docs.PACKAGES) and len(real.labels) >= 6
    )  # idlelib may be absent
    assert len(real.train) > 1000 and len(real.held_out) > 200
    for part in (real.train, real.held_out):
        assert {example.label for example in part} == set(real.labels)
    assert 0.05 < real.majority_accuracy < 0.4


def test_no_module_and_no_text_is_on_both_sides(real):
    assert not {e.source for e in real.train} & {e.source for e in real.held_out}
    texts = Counter(normalized(e.text) for e in [*real.train, *real.held_out])
    assert max(texts.values()) == 1


def test_a_module_belongs_to_its_label(real):
    for example in [*real.train, *real.held_out]:
        assert example.source.split(".")[0] == example.label


def test_about_a_quarter_of_each_label_is_held_out(real):
    for label in real.labels:
        held = sum(e.label == label for e in real.held_out)
        total = held + sum(e.label == label for e in real.train)
        assert 0.15 * total < held < 0.35 * total, label


def test_the_answer_is_not_written_in_the_text(real):
    for example in [*real.train, *real.held_out]:
        words = set(example.text.lower().replace(".", " ").replace("'", " ").split())
        assert not words & set(stdlib_docs.PACKAGES)


def test_second_load_reads_the_cache_and_gives_the_same(tmp_path, library, monkeypatch):
    first = stdlib_docs.load_stdlib(tmp_path / "cache", library)
    monkeypatch.setattr(stdlib_docs, "extract", lambda root: pytest.fail("extracted again"))
    assert stdlib_docs.load_stdlib(tmp_path / "cache", library) == first
    assert len(list((tmp_path / "cache").iterdir())) == 1  # and no temporary file stays


def test_a_damaged_cache_is_made_again(tmp_path, library):
    first = stdlib_docs.load_stdlib(tmp_path / "cache", library)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_text("[[1, 2")
    assert stdlib_docs.load_stdlib(tmp_path / "cache", library) == first


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path, library):
    (tmp_path / "file").write_text("")
    assert stdlib_docs.load_stdlib(tmp_path / "file" / "cache", library).labels == [
        "asyncio",
        "email",
        "xml",
    ]


def test_extraction_skips_tests_short_texts_and_broken_files(tmp_path):
    for path, source in {
        "xml/a.py": '"""One docstring with enough words, about xml and XML."""\ndef f():\n    """Too short."""\n',
        "xml/tests/b.py": '"""A docstring of a test module, with enough words."""\n',
        "xml/broken.py": '"""Enough words here, but what follows is not Python."""\ndef (\n',
        "xml/boom.py": '"""This module would fail if somebody imported it."""\nraise SystemExit\n',
        "email/c.py": '"""One docstring with enough words, about  package and package."""\n',
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)
    examples = stdlib_docs.extract(tmp_path)
    # the texts of xml.a and email.c are equal once masked, so no label for them is right
    assert [(e.text, e.source) for e in examples] == [
        ("This module would fail if somebody imported it.", "xml.boom")
    ]


def test_a_stripped_library_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--data: got none, .* too few docstrings \(0\)"):
        stdlib_docs.load_stdlib(tmp_path / "cache", tmp_path / "nothing")
