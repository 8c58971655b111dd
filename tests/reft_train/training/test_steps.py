"""What a step costs: one build of R, a few tensors in the optimizer, and no memory that grows."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
import torch
from reft_train.__main__ import parser
from reft_train.flags import settings as settings_of
from reft_train.training.session import train
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import TrainerCallback

from reft_kernels.interventions import Intervention
from tests.reft_train.runs import command, instructions, run, write_rows


class Optimizers(TrainerCallback):
    """Keeps the optimizer of a run."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.groups = kwargs["optimizer"].param_groups


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", instructions(32))


def trained(arguments: list[str], callback: TrainerCallback) -> None:
    train(settings_of(parser().parse_args(arguments)), callbacks=[callback])


def test_the_optimizer_has_at_most_three_tensors_for_loreft(tiny_llama, tmp_path, rows):
    kept = Optimizers()
    trained(command(tiny_llama, tmp_path / "run", train=rows, max_steps=1, skip_test=True), kept)
    assert 0 < sum(len(group["params"]) for group in kept.groups) <= 3


@pytest.mark.parametrize("accumulation", [1, 4])
def test_r_is_built_once_an_optimizer_step(accumulation, tiny_llama, tmp_path, rows):
    built = []

    def count(module: torch.nn.Module, arguments: tuple) -> None:
        if (
            isinstance(module, Intervention) and torch.is_grad_enabled()
        ):  # the log measures R without gradients
            built.append(module)

    settings = {
        "train": rows,
        "accumulation": accumulation,
        "batch_size": 2,
        "max_steps": 3,
        "skip_test": True,
    }
    with register_module_forward_pre_hook(count):
        assert run(tiny_llama, tmp_path / "run", **settings) == 0
    assert len(built) == 3


class Memory(TrainerCallback):
    """Resident memory and live tensors at some steps."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps
        self.resident: list[int] = []
        self.tensors: list[int] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step in self.steps:
            gc.collect()
            self.tensors.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            self.resident.append(pages * 4096)


@pytest.mark.slow  # a thousand steps
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc/self/statm")
def test_memory_is_flat_over_a_thousand_steps(tiny_llama, tmp_path, rows):
    # files, pools and threads reach their size in the first hundreds of steps; the second half is
    # what a long run repeats
    marks = (500, 600, 700, 800, 900, 1000)
    memory = Memory(marks)
    settings = {
        "train": rows,
        "max_steps": 1000,
        "batch_size": 1,
        "accumulation": 1,
        "max_length": 16,
        "positions": "f1+l1",
    }
    trained(
        command(
            tiny_llama,
            tmp_path / "run",
            skip_test=True,
            save_every=2000,
            log_every=2000,
            **settings,
        ),
        memory,
    )
    assert memory.tensors[0] == memory.tensors[-1], memory.tensors
    # A step that keeps anything keeps a tensor with its storage and Python objects, over 1 KiB; the
    # step's time is 40 bytes. The allocator adds pages now and then; a leak adds them everywhere.
    growth = [after - before for before, after in itertools.pairwise(memory.resident)]
    assert min(growth) < (marks[1] - marks[0]) * 1024, growth
