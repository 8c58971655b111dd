"""Entry point of the group ``vllm.general_plugins``, called in every process of an engine.

It makes vLLM check the adapter of a request before the request is queued, in the process that
accepts it. The check also runs in engines without ReFT, where a request for an adapter would
otherwise get an answer of the base model.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

from reft_kernels.serving.errors import AdapterError
from reft_kernels.serving.registry import Registry
from reft_kernels.serving.requests import KEY, parse_request
from reft_kernels.serving.vllm import settings

_logger = logging.getLogger(__name__)

REGISTRY = "_reft_registry"
"""Attribute of the configuration that holds the registry of an engine in the same process."""


def register() -> None:
    """Patch ``InputProcessor.process_inputs``, once."""
    try:
        from vllm.v1.engine.input_processor import InputProcessor
    except ImportError:  # another version of vLLM, whose users may not want this plugin at all
        _logger.warning("vllm: no InputProcessor, expected a version that reft_kernels supports")
        return
    original = InputProcessor.process_inputs
    if hasattr(original, "reft_original"):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        check_request(self.vllm_config, bound["params"], bool(bound.get("resumable", False)))
        return original(self, *args, **kwargs)

    wrapper: Any = process_inputs
    wrapper.reft_original = original
    InputProcessor.process_inputs = wrapper


def adapter_value(params: Any) -> Any:
    """Return what a request's parameters say about its adapter, or None."""
    extra = getattr(params, "extra_args", None)
    return extra.get(KEY) if extra else None


def check_request(vllm_config: Any, params: Any, resumable: bool = False) -> None:
    """Check what a request says about its adapter.

    Args:
        vllm_config: Configuration of the engine.
        params: Sampling or pooling parameters.
        resumable: Whether the prompt may be continued later.

    Raises:
        AdapterError: If it is malformed, the engine serves no adapters, or, where the engine runs
            in this process, the adapter is unknown.
    """
    value = adapter_value(params)
    if value is None:
        return
    config = getattr(vllm_config, "additional_config", None)
    if not isinstance(config, dict) or settings.KEY not in config:
        raise AdapterError(
            f"{KEY}: got {value!r}, expected none: this engine serves no ReFT adapters (start it "
            "with the arguments of reft_kernels.serving.vllm.engine_arguments)"
        )
    request = parse_request(value)
    if resumable:
        raise AdapterError(
            f"{KEY}: got {value!r} for a prompt that is streamed, expected a whole prompt: its "
            "positions depend on its end"
        )
    registry: Registry | None = getattr(vllm_config, REGISTRY, None)
    if registry is not None:
        registry.get(request.adapter)
