"""Small things to train on: a standard library of a few modules, and a random BERT with its
tokenizer.
"""

from __future__ import annotations

from pathlib import Path

import pytest

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
    """A folder that looks like a standard library: three packages of six modules of six
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
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT of two layers and a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, **names
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=0.1,
    )
    BertModel(config).save_pretrained(folder)
    return folder
