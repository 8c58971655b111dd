"""Which engines are refused, and how CUDA graphs are divided."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest


def _config(**changes):
    told = {
        "scheduler": "reft_kernels.serving.vllm.scheduler.ReftScheduler",
        "enable_dbo": False,
        "prefill_context_parallel_size": 1,
        "enable_sp": False,
        "kv_sharing_fast_prefill": False,
    } | changes
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(scheduler_cls=told["scheduler"]),
        parallel_config=SimpleNamespace(
            enable_dbo=told["enable_dbo"],
            prefill_context_parallel_size=told["prefill_context_parallel_size"],
        ),
        compilation_config=SimpleNamespace(
            pass_config=SimpleNamespace(enable_sp=told["enable_sp"])
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=told["kv_sharing_fast_prefill"]),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheduler": None}, "scheduler_cls: got None"),
        ({"scheduler": "vllm.v1.core.sched.scheduler.Scheduler"}, "sets the cache salts"),
        ({"enable_dbo": True}, "enable_dbo: got a setting that ReFT cannot serve"),
        ({"enable_sp": True}, "enable_sp: .* divides the rows"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size: "),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill: "),
    ],
)
def test_engines_without_correct_edits_are_refused(change, message):
    from reft_kernels.serving.errors import AdapterError
    from reft_kernels.serving.vllm import compatibility

    compatibility.check_config(_config())
    with pytest.raises(AdapterError, match=message):
        compatibility.check_config(_config(**change))


def test_versions(caplog):
    from reft_kernels.serving.errors import AdapterError
    from reft_kernels.serving.vllm import compatibility

    compatibility.check_version("0.33.1+cpu")
    assert not caplog.records
    with pytest.raises(
        AdapterError, match="got version 0.31.2, expected 0.32 or later, below 0.34"
    ):
        compatibility.check_version("0.31.2")
    with caplog.at_level(logging.WARNING):
        compatibility.check_version("0.34.0")
        compatibility.check_version("dev")
    assert len(caplog.records) == 2


def test_the_operator_divides_graphs():
    from vllm.config import CompilationMode, CUDAGraphMode

    from reft_kernels.serving.vllm import compatibility, operator

    compiled, eager = CompilationMode.VLLM_COMPILE, CompilationMode.NONE
    attention = ["vllm::unified_attention"]
    for compilation, mode, splits, allowed in (
        (compiled, CUDAGraphMode.FULL_AND_PIECEWISE, attention, CUDAGraphMode.PIECEWISE),
        (compiled, CUDAGraphMode.FULL_DECODE_ONLY, attention, CUDAGraphMode.PIECEWISE),
        (compiled, CUDAGraphMode.PIECEWISE, attention, CUDAGraphMode.PIECEWISE),
        (compiled, CUDAGraphMode.NONE, attention, CUDAGraphMode.NONE),
        (compiled, CUDAGraphMode.FULL, [], CUDAGraphMode.NONE),
        # graphs that are broken at attention while they are captured, without compilation
        (eager, CUDAGraphMode.PIECEWISE, attention, CUDAGraphMode.NONE),
        (eager, CUDAGraphMode.NONE, None, CUDAGraphMode.NONE),
    ):
        config = SimpleNamespace(
            mode=compilation, cudagraph_mode=mode, splitting_ops=splits and list(splits)
        )
        compatibility.divide_graphs(config)
        compatibility.divide_graphs(config)
        assert config.cudagraph_mode == allowed
        divided = compilation == compiled and bool(splits)
        assert (config.splitting_ops or []).count(operator.NAME) == divided
