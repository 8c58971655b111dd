"""The gate of training steps tells right from wrong, for the suites that stand on it."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import models, shapes
from benchmarks.correctness import StepGate
from benchmarks.models import Packed
from benchmarks.suites import packing, trainer_step

SHAPE = dataclasses.replace(shapes.QUICK, vocabulary=256, batch=4)


@pytest.fixture(scope="module")
def examples():
    return packing.pool("boolq", 0, SHAPE.vocabulary)[: SHAPE.batch]


@pytest.fixture(scope="module")
def gate(examples):
    return StepGate(SHAPE, "cpu", packing.padded(examples, SHAPE, "cpu"))


def test_a_packed_batch_gives_the_padded_ones_loss_and_gradients(gate, examples):
    verdict = gate(models.by_peft, packing.packed(examples, "cpu"))
    assert 0 < verdict.error <= verdict.allowed


def test_packed_examples_that_see_each_other_are_caught(gate, examples):
    inputs = packing.packed(examples, "cpu").inputs
    first = (inputs["labels"] != -100).int().argmax(dim=1)  # where each row's first response starts
    leaking = Packed(
        {name: t for name, t in inputs.items() if name != "position_ids"}
        | {"prompt_lengths": first}
    )
    verdict = gate(models.by_peft, leaking)
    assert verdict.error > verdict.allowed


def test_other_examples_are_caught(gate):
    others = packing.pool("questions", 1, SHAPE.vocabulary)[: SHAPE.batch]
    verdict = gate(models.by_peft, packing.packed(others, "cpu"))
    assert verdict.error > verdict.allowed


def test_the_programs_first_step_is_held_to_fp64_and_clipped_gradients_are_caught():
    data = trainer_step.items(SHAPE, 8)
    verdict = trainer_step.gate(SHAPE, "cpu", data)
    assert 0 < verdict.error <= verdict.allowed
    clipped = trainer_step.gate(SHAPE, "cpu", data, clip=1e-6)
    assert clipped.error > clipped.allowed
