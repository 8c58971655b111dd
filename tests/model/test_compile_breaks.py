"""torch.compile with breaks in the graph: what a call said is kept for each thread.

Training over the breaks of a real model: ``tests/families``, gpt2-compile.
"""

from __future__ import annotations

import threading

import pytest
import torch
from peft import get_peft_model

from reft_kernels.integrations.peft import ReftConfig
from reft_kernels.model.per_thread import PerThread
from tests.model.families import batch, make, shake


class Plain:
    def __init__(self):
        self.value = None


def test_an_object_for_each_thread():
    held = PerThread(Plain)
    held.here.value = 1
    seen = []
    thread = threading.Thread(target=lambda: seen.append(held.here.value))
    thread.start()
    thread.join()
    assert seen == [None] and held.here.value == 1


def broken(model):
    """The model's own forward ends a graph before it calls the backbone, as a logger does."""
    kind = type(model)

    def forward(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return kind.forward(self, *args, **kwargs)

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompt_lengths_over_a_break(family):
    inputs = {k: v for k, v in batch(family).items() if k != "labels"}
    lengths = [2] * inputs["input_ids"].shape[0]
    model = get_peft_model(broken(make(family)), ReftConfig(rank=4, positions="f1+l1"))
    shake(model)
    model.eval()
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            expected = model(**inputs, prompt_lengths=lengths).logits
            got = compiled(**inputs, prompt_lengths=lengths).logits
            other = model(**inputs).logits
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(other, expected)
