"""Settings of an engine under which edits would be wrong or missing, and how graphs are captured.

A step's rows and weights are no arguments of the operator, so that a CUDA graph must not contain
it: it would repeat the edits of the step it was captured in. The operator therefore divides
compiled graphs, as attention does, and runs between captured pieces; graphs of whole forwards are
not captured. (Written from vLLM's code; no GPU has run it yet.)
"""

from __future__ import annotations

import logging
from typing import Any

from vllm.config import CUDAGraphMode
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
    if vllm_config.parallel_config.enable_dbo:
        raise AdapterError("enable_dbo: got True, expected False: microbatches renumber the rows")
    passes = getattr(vllm_config.compilation_config, "pass_config", None)
    if getattr(passes, "enable_sp", False):
        raise AdapterError(
            "enable_sp: got True, expected False: sequence parallelism divides the rows of layers"
        )


def divide_graphs(compilation_config: Any) -> None:
    """Keep the operator out of CUDA graphs; changes the worker's configuration."""
    mode = compilation_config.cudagraph_mode
    divided = bool(compilation_config.splitting_ops)
    if divided and operator.NAME not in compilation_config.splitting_ops:
        compilation_config.splitting_ops.append(operator.NAME)
    if mode is not None and mode.has_full_cudagraphs():
        reduced = CUDAGraphMode.PIECEWISE if divided else CUDAGraphMode.NONE
        _logger.info("cudagraph_mode: %s instead of %s, for ReFT's edits", reduced, mode)
        compilation_config.cudagraph_mode = reduced
