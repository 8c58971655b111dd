"""Plugin for vLLM: many ReFT adapters on one base model, in one batch, without a fork.

Importing this module needs no vLLM; its other modules do. :func:`engine_arguments` makes the
arguments of an engine:

    LLM(model=name, **engine_arguments(adapters={"german": folder}))

A request names its adapter in ``SamplingParams(extra_args={"reft": "german"})``; see
:mod:`reft_kernels.serving.requests`. ``collective_rpc`` calls ``reft_load_adapter(name, folder)``,
``reft_unload_adapter(name)`` and ``reft_list_adapters()`` of :class:`worker.ReftWorker`.

Supported: vLLM 0.32 and 0.33, decoder models whose layers return (hidden, residual).
"""

from reft_kernels.serving.vllm.settings import engine_arguments

__all__ = ["engine_arguments"]
