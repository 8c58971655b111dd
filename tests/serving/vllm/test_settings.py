"""Which engines are refused, and how CUDA graphs are divided."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest


def _config(**changes):
    told = {
        "scheduler": "reft_kernels.serving.vllm.scheduler.ReftScheduler",
        "dbo": False,
        "sp": False,
    }
    told |= changes
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(scheduler_cls=told["scheduler"]),
        parallel_config=SimpleNamespace(enable_dbo=told["dbo"]),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(enable_sp=told["sp"])),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheduler": None}, "scheduler_cls: got None"),
        ({"scheduler": "vllm.v1.core.sched.scheduler.Scheduler"}, "sets the cache salts"),
        ({"dbo": True}, "enable_dbo: got True"),
        ({"sp": True}, "enable_sp: got True"),
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
    from vllm.config import CUDAGraphMode

    from reft_kernels.serving.vllm import compatibility, operator

    for mode, splits, reduced in (
        (CUDAGraphMode.FULL_AND_PIECEWISE, ["vllm::attention"], CUDAGraphMode.PIECEWISE),
        (CUDAGraphMode.FULL, [], CUDAGraphMode.NONE),
        (CUDAGraphMode.PIECEWISE, ["vllm::attention"], CUDAGraphMode.PIECEWISE),
        (CUDAGraphMode.NONE, None, CUDAGraphMode.NONE),
    ):
        config = SimpleNamespace(cudagraph_mode=mode, splitting_ops=splits)
        compatibility.divide_graphs(config)
        compatibility.divide_graphs(config)
        assert config.cudagraph_mode == reduced
        assert not splits or config.splitting_ops.count(operator.NAME) == 1
