"""Small things to train on: a standard library of a few modules, and a random chat model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_chat import save_chat_model

TEXT = """read write event loop task wait header message parse mail body node tree tag text element attribute of the a
an in to from is are and or not with for by this that package return value given name object call when"""
WORDS = TEXT.split()


def sentence(topic: list[str], number: int) -> str:
    """A docstring-like sentence, distinct for each number."""
    picked = [topic[(number + step) % len(topic)] for step in range(4)]
    filler = [WORDS[(7 * number + 3 * step) % len(WORDS)] for step in range(4)]
    return (
        " ".join(picked + filler)
        + f" {'the ' * (number // len(WORDS))}{WORDS[number % len(WORDS)]}"
    )


TOPICS = {
    "asyncio": ["event", "loop", "task", "wait"],
    "email": ["header", "message", "mail", "body"],
    "xml": ["node", "tree", "element", "tag"],
}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder that looks like a standard library: three packages of six modules of ten
    docstrings.
    """
    root = tmp_path / "lib"
    for package, topic in TOPICS.items():
        folder = root / package
        folder.mkdir(parents=True)
        for module in range(6):
            numbers = range(10 * module, 10 * module + 10)
            functions = [f'def f{n}():\n    """{sentence(topic, n)}"""\n' for n in numbers]
            (folder / f"m{module}.py").write_text("\n".join(functions))
    return root


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers and a tokenizer with a chat template."""
    return save_chat_model(tmp_path_factory.mktemp("chat-model"))
