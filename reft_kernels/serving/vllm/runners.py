"""Hooks into vLLM's model runners: where a step's requests, rows and columns are known.

The V1 runner calls ``_model_forward`` for every forward of a step, with its batch prepared. The V2
runner calls ``prepare_inputs`` of its model state right before the forward.
"""

from __future__ import annotations

from typing import Any

from reft_kernels.serving.errors import AdapterError
from reft_kernels.serving.vllm import operator
from reft_kernels.serving.vllm.state import WorkerState


class Steps:
    """Context manager around ``execute_model``; forwards outside of it edit nothing.

    Args:
        runner: The model runner.
        state: The worker's adapters and edits.
    """

    def __init__(self, runner: Any, state: WorkerState) -> None:
        self.runner, self.state, self.running = runner, state, False

    def __enter__(self) -> None:
        self.running = True

    def __exit__(self, *error: Any) -> None:
        self.running = False


class _V1(Steps):
    def __init__(self, runner: Any, state: WorkerState) -> None:
        super().__init__(runner, state)
        self.forward = runner._model_forward
        runner._model_forward = self.call

    def call(self, *args: Any, **kwargs: Any) -> Any:
        step = None
        if self.running:
            batch = self.runner.input_batch
            step = self.state.step(
                batch.req_ids,
                self.runner.query_start_loc.np,
                batch.num_computed_tokens_cpu,
                batch.num_reqs,
            )
        with operator.during(step):
            return self.forward(*args, **kwargs)


class _V2(Steps):
    def __init__(self, runner: Any, state: WorkerState) -> None:
        super().__init__(runner, state)
        self.prepare = runner.model_state.prepare_inputs
        runner.model_state.prepare_inputs = self.call

    def call(self, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self.running:
            operator.set_step(
                self.state.step(
                    input_batch.req_ids,
                    input_batch.query_start_loc_np,
                    input_batch.num_computed_tokens_np,
                    input_batch.num_reqs,
                )
            )
        return self.prepare(input_batch, *args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        operator.set_step(None)
        super().__exit__(*error)


def attach(runner: Any, state: WorkerState) -> Steps:
    """Hook into a model runner.

    Raises:
        AdapterError: If it is neither of the known kinds.
    """
    if hasattr(runner, "_model_forward") and hasattr(runner, "input_batch"):
        return _V1(runner, state)
    if hasattr(getattr(runner, "model_state", None), "prepare_inputs"):
        return _V2(runner, state)
    raise AdapterError(
        f"model runner: got {type(runner).__module__}.{type(runner).__name__}, expected vLLM's V1 "
        "or V2 model runner"
    )
