"""The hooks into both model runners, on runners that do nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from reft_kernels.positions import parse
from reft_kernels.serving.adapters import ServedModel
from reft_kernels.serving.bank import Bank
from reft_kernels.serving.errors import AdapterError
from reft_kernels.serving.positions import edited_ranges
from reft_kernels.serving.steps import Edit
from reft_kernels.serving.vllm import operator, runners
from reft_kernels.serving.vllm.messages import News
from reft_kernels.serving.vllm.settings import parse as parse_settings
from reft_kernels.serving.vllm.state import WorkerState
from tests.serving.served import adapter


@pytest.fixture
def state():
    """A worker's state with one adapter, and edits of the requests "a" and "c"."""
    made = WorkerState(parse_settings({}), ServedModel(6, 2), Bank((0, 1), 6, 2, 4, "cpu"))
    made.adapters["x"] = adapter("x")
    ranges = edited_ranges(parse("f2+l1"), False, 10)
    made.update(News({name: Edit("x", ranges) for name in "ac"}, ()), ())
    return made


# the batch: "a" computes columns 0 to 5, "b" has no adapter, "c" computes columns 8 and 9
_ROWS, _COLUMNS = np.array([0, 5, 8, 10, 10]), np.array([0, 7, 8, 99])
_EXPECTED = [0, 1, 9]


def _rows(step) -> list[int]:
    return step.layers[0][0].rows.tolist()


def _first(seen):

    batch = SimpleNamespace(req_ids=["a", "b", "c"], num_computed_tokens_cpu=_COLUMNS, num_reqs=3)
    runner = SimpleNamespace(input_batch=batch, query_start_loc=SimpleNamespace(np=_ROWS))
    runner._model_forward = lambda: seen.append(operator._current)
    return runner, lambda: runner._model_forward()


def _second(seen):

    batch = SimpleNamespace(
        req_ids=["a", "b", "c"],
        num_computed_tokens_np=_COLUMNS,
        query_start_loc_np=_ROWS,
        num_reqs=3,
    )
    runner = SimpleNamespace(model_state=SimpleNamespace(prepare_inputs=lambda batch, states: {}))

    def execute():
        assert runner.model_state.prepare_inputs(batch, None) == {}
        seen.append(operator._current)

    return runner, execute


@pytest.mark.parametrize("make", (_first, _second))
def test_a_step_is_there_during_execution_only(state, make):

    seen: list = []
    runner, execute = make(seen)
    steps = runners.attach(runner, state)
    execute()  # a forward for profiling
    assert seen == [None]
    with steps:
        execute()
    assert _rows(seen[1]) == _EXPECTED and not operator.has_step()
    with pytest.raises(RuntimeError), steps:
        execute()
        raise RuntimeError
    assert not operator.has_step()
    state.update(None, ("a", "c"))
    with steps:
        execute()
    assert seen[-1] is None


def test_another_runner_is_refused_by_name(state):

    with pytest.raises(AdapterError, match="SimpleNamespace, expected vLLM's V1 or V2"):
        runners.attach(SimpleNamespace(), state)
