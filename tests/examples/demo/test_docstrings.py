"""The docstring task: its split, its texts, and its conversations."""

from __future__ import annotations

from collections import Counter

import pytest
from reft_train.errors import UserError

from examples.demo.docstrings import conversation, docstrings, named


def test_modules_are_held_out_and_the_label_is_hidden(library):
    train, test = docstrings(12, 6, library)
    assert Counter(label for _, label in train) == {"asyncio": 12, "email": 12, "xml": 12}
    assert Counter(label for _, label in test) == {"asyncio": 6, "email": 6, "xml": 6}
    texts = [text for text, _ in (*train, *test)]
    assert len(set(texts)) == len(texts)
    assert not any(named(text) for text in texts)
    sources = {path: " ".join(path.read_text().split()) for path in sorted(library.rglob("*.py"))}
    of = [
        {p for p, source in sources.items() for text, _ in part if text in source}
        for part in (train, test)
    ]
    assert of[0] and of[1] and not of[0] & of[1]
    assert docstrings(12, 6, library) == (train, test)


def test_names_of_packages_in_a_text_are_replaced(tmp_path):
    for package, number in {"email": 0, "xml": 10}.items():
        (tmp_path / package).mkdir()
        for module in range(4):
            text = f"Reads the XML header of an email, in module {number + module} of {package}."
            (tmp_path / package / f"m{module}.py").write_text(f'"""{text}"""')
    train, _ = docstrings(1, 1, tmp_path)
    assert all(named(text) is None and "package header" in text for text, _ in train)


def test_too_little_text_is_refused(library):
    with pytest.raises(UserError, match="standard library: got .* two packages with 99 each"):
        docstrings(90, 9, library)


def test_a_pair_becomes_a_conversation():
    messages = conversation("Parses a header.", "email", ["email", "xml"])
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert "email, xml?" in messages[0]["content"] and messages[-1]["content"] == "email"


def test_the_first_package_that_an_answer_names_counts():
    assert named("It is from Email, not from xml.") == "email"
    assert named("The emails of the xmlrpc module") is None
