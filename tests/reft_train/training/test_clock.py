"""The clock of optimizer steps."""

from __future__ import annotations

import time

import pytest
import torch
from reft_train.training.clock import StepClock


def test_a_step_lasts_from_its_first_beginning_to_its_end():
    clock = StepClock(torch.device("cpu"))
    clock.begin()
    time.sleep(0.05)
    clock.begin()
    clock.end()
    assert clock.median() >= 0.05


def test_no_step_no_time():
    clock = StepClock(torch.device("cpu"))
    clock.end()
    assert clock.median() == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("settled", [True, False])
def test_events_measure_the_work_of_a_gpu(settled):
    clock = StepClock(torch.device("cuda"))
    torch.cuda.synchronize()
    started = time.perf_counter()
    clock.begin()
    torch.cuda._sleep(50_000_000)
    clock.end()
    if settled:
        torch.cuda.synchronize()
        clock.settle()
    assert 0.0 < clock.median() <= time.perf_counter() - started
