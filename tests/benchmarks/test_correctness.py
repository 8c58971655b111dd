"""Tests of the accuracy check of training steps."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import models, shapes
from benchmarks.correctness import StepGate
from benchmarks.models import PackedBatch
from benchmarks.suites import packing, trainer_step

SHAPE = dataclasses.replace(shapes.QUICK, vocabulary=256, batch=4)


@pytest.fixture(scope="module")
def examples():
    return packing.pool("boolq", 0, SHAPE.vocabulary)[: SHAPE.batch]


@pytest.fixture(scope="module")
def gate(examples):
    return StepGate(SHAPE, "cpu", packing.padded(examples, SHAPE, "cpu"))


def test_a_packed_batch_gives_the_padded_ones_loss_and_gradients(gate, examples):
    verdict = gate(models.peft_stepper, packing.packed(examples, "cpu"))
    assert 0 < verdict.error <= verdict.allowed


def test_packed_examples_that_see_each_other_are_caught(gate, examples):
    inputs = packing.packed(examples, "cpu").inputs
    first = (inputs["labels"] != -100).int().argmax(dim=1)  # start of each row's first response
    leaking = PackedBatch(
        {name: t for name, t in inputs.items() if name != "position_ids"}
        | {"prompt_lengths": first}
    )
    verdict = gate(models.peft_stepper, leaking)
    assert verdict.error > verdict.allowed


def test_other_examples_are_caught(gate):
    others = packing.pool("questions", 1, SHAPE.vocabulary)[: SHAPE.batch]
    verdict = gate(models.peft_stepper, packing.packed(others, "cpu"))
    assert verdict.error > verdict.allowed


def test_the_programs_first_step_is_held_to_fp64_and_clipped_gradients_are_caught():
    data = trainer_step.items(SHAPE, 8)
    verdict = trainer_step.gate(SHAPE, "cpu", data)
    assert 0 < verdict.error <= verdict.allowed
    clipped = trainer_step.gate(SHAPE, "cpu", data, clip=1e-6)
    assert clipped.error > clipped.allowed
