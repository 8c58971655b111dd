"""A tiny Llama with a LoReFT adapter that changes what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from reft_train import tasks
from reft_train.config import build
from reft_train.methods import adapt
from reft_train.models import load

from tests.reft_train.tiny import shake

CAPITALS = (
    "one two three",
    "four",
    "five six seven eight nine ten eleven twelve",
    "a b",
    "true or false?",
    "x",
    "y z",
)


def settings(model, **values):
    """Settings of a small evaluation on a CPU."""
    small = {
        "task": "boolq",
        "rank": 2,
        "layers": "all",
        "device": "cpu",
        "max_new_tokens": 6,
        "max_length": 96,
    }
    return build({"model": str(model), **small, **values})


def adapted(model, **values):
    """The settings and the model with a fresh adapter, moved away from its start."""
    config = settings(model, **values)
    loaded = load(config, tasks.get(config.task))
    return config, replace(loaded, model=shake(adapt(config, loaded)))


@pytest.fixture
def loreft(tiny_llama):
    """Settings and a LoReFT model."""
    return adapted(tiny_llama)
