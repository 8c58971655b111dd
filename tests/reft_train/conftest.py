"""Folders with tiny random models and their tokenizers, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reft_train import tiny
from tests.tiny_chat import save_chat_model


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal Llama of two layers."""
    return tiny.save_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder-decoder T5 of two layers."""
    return tiny.save_t5(tmp_path_factory.mktemp("tiny-t5"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT encoder of two layers, without a head."""
    return tiny.save_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers and a tokenizer with a chat template."""
    return save_chat_model(tmp_path_factory.mktemp("chat-model"))
