"""Serving of many ReFT adapters from one base model, in one batch.

The modules of this package do not depend on a serving engine; :mod:`reft_kernels.serving.vllm` is
the plugin for vLLM.
"""
