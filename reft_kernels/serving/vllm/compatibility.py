"""Settings of an engine under which edits would be wrong or missing, and how graphs are captured.

A step's rows and weights are no arguments of the operator, so that a CUDA graph must not contain
it: it would repeat the edits of the step it was captured in. The operator therefore divides
compiled graphs, as attention does, and runs between captured pieces; graphs of whole forwards are
not captured. (Written from vLLM's code; no GPU has run it yet.)
"""

from __future__ import annotations

import logging
from typing import Any

from vllm.config import CompilationMode, CUDAGraphMode
from vllm.version import __version__ as vllm_version

from reft_kernels.serving.errors import AdapterError
from reft_kernels.serving.vllm import operator, settings

SUPPORTED = ((0, 32), (0, 34))
"""The first supported release of vLLM, and the first that is not known to be."""

_SCHEDULERS = ("ReftScheduler", "ReftAsyncScheduler")
_logger = logging.getLogger(__name__)


def _release(version: str) -> tuple[int, int] | None:
    parts = version.split("+")[0].split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (IndexError, ValueError):  # a development version
        return None


def check_version(version: str = vllm_version) -> None:
    """Raise AdapterError for an older vLLM than the supported range, and warn for a newer one."""
    release = _release(version)
    first, end = SUPPORTED
    expected = f"{'.'.join(map(str, first))} or later, below {'.'.join(map(str, end))}"
    if release is not None and release < first:
        raise AdapterError(f"vllm: got version {version}, expected {expected}")
    if release is None or release >= end:
        _logger.warning("vllm: got version %s, which is not tested; expected %s", version, expected)


def check_config(vllm_config: Any) -> None:
    """Raise AdapterError if the engine's configuration does not go with edits."""
    scheduler = vllm_config.scheduler_config.scheduler_cls
    name = scheduler if isinstance(scheduler, str) else getattr(scheduler, "__qualname__", "")
    if (name or "").rpartition(".")[2] not in _SCHEDULERS:
        raise AdapterError(
            f"scheduler_cls: got {scheduler!r}, expected {settings.SCHEDULER!r}, which sets the "
            "cache salts"
        )
    parallel, passes = vllm_config.parallel_config, vllm_config.compilation_config.pass_config
    for name, on, reason in (
        ("enable_dbo", parallel.enable_dbo, "microbatches renumber the rows"),
        (
            "prefill_context_parallel_size",
            parallel.prefill_context_parallel_size > 1,
            "a rank computes a part of each prompt",
        ),
        (  # not in every release
            "enable_sp",
            getattr(passes, "enable_sp", False),
            "sequence parallelism divides the rows of layers",
        ),
        (
            "kv_sharing_fast_prefill",
            vllm_config.cache_config.kv_sharing_fast_prefill,
            "the last layers compute a part of each prompt",
        ),
    ):
        if on:
            raise AdapterError(
                f"{name}: got a setting that ReFT cannot serve, expected it off: {reason}"
            )


def divide_graphs(compilation_config: Any) -> None:
    """Keep the operator out of CUDA graphs; changes the worker's configuration."""
    mode, splits = compilation_config.cudagraph_mode, compilation_config.splitting_ops
    divided = compilation_config.mode == CompilationMode.VLLM_COMPILE and bool(splits)
    if divided and operator.NAME not in splits:
        splits.append(operator.NAME)
    allowed = CUDAGraphMode.PIECEWISE if divided else CUDAGraphMode.NONE
    if mode not in (None, CUDAGraphMode.NONE, allowed):
        _logger.info("cudagraph_mode: %s instead of %s, for ReFT's edits", allowed, mode)
        compilation_config.cudagraph_mode = allowed
