"""An engine of vLLM beside its oracle."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from tests.serving.vllm import models

BLOCK = 32  # the smallest block of vLLM's attention on the CPU


def engine_options(**options: Any) -> dict[str, Any]:
    """Return arguments of an engine for a tiny model on the CPU."""
    return {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 16,
        "block_size": BLOCK,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": 64 << 20,
        "disable_log_stats": False,  # counts cached tokens
        **options,
    }


class Served:
    """A model with adapters in an engine, and with transformers and PEFT.

    Args:
        root: Folder for the files.
        kind: A model of :data:`models.CONFIGS`.
        adapters: The adapters; all of :data:`models.ADAPTERS` if None.
        slots: Slots of the bank.
        **options: Arguments of the engine.
    """

    def __init__(
        self,
        root: Path,
        kind: str,
        adapters: dict[str, dict[str, Any]] | None = None,
        slots: int = 4,
        model: Any = None,
        **options: Any,
    ) -> None:
        from vllm import LLM

        from reft_kernels.serving.vllm import engine_arguments

        adapters = models.ADAPTERS if adapters is None else adapters
        self.folder = root / kind
        if model is None:
            model = models.make_model(kind, self.folder / "model")
        self.model = model
        self.peft = models.make_adapters(model, self.folder / "adapters", adapters)
        self.names = list(adapters)
        self.paths = {name: self.folder / "adapters" / name for name in adapters}
        self.llm = LLM(
            model=str(self.folder / "model"),
            **engine_options(**options),
            **engine_arguments(self.paths, slots=slots, max_rank=8),
        )
        self._expected: dict[tuple, list[int]] = {}

    @property
    def scheduler(self) -> Any:
        """The engine's scheduler."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def worker(self) -> Any:
        """The engine's worker."""
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker

    def expected(self, prompt: list[int], adapter: str | None, count: int = 12) -> list[int]:
        """Return the tokens of transformers and PEFT."""
        key = (tuple(prompt), adapter, count)
        if key not in self._expected:
            self._expected[key] = models.generate(self.peft, prompt, adapter, count)
        return self._expected[key]

    def outputs(self, requests: list[tuple[list[int], Any]], count: int = 12, **params) -> list:
        """Return the engine's outputs for (prompt, value of "reft") pairs, as one batch."""
        from vllm import SamplingParams

        chosen = [
            SamplingParams(
                temperature=0.0,
                max_tokens=count,
                ignore_eos=True,
                detokenize=False,
                extra_args=None if value is None else {"reft": value},
                **params,
            )
            for _, value in requests
        ]
        texts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        return self.llm.generate(texts, chosen, use_tqdm=False)

    def tokens(self, requests: list[tuple[list[int], Any]], count: int = 12) -> list[list[int]]:
        """Return the engine's tokens for (prompt, value of "reft") pairs, as one batch."""
        return [list(o.outputs[0].token_ids) for o in self.outputs(requests, count)]

    def check(self, requests: list[tuple[list[int], str | None]], count: int = 12) -> None:
        """Assert that the engine's tokens are those of transformers and PEFT."""
        got = self.tokens(requests, count)
        wanted = [self.expected(prompt, adapter, count) for prompt, adapter in requests]
        wrong = [
            (len(prompt), adapter)
            for (prompt, adapter), one, other in zip(requests, got, wanted, strict=True)
            if one != other
        ]
        assert not wrong, f"other tokens than transformers' for (length, adapter) {wrong}"

    def forget_cache(self) -> None:
        """Empty the prefix cache."""
        assert self.llm.reset_prefix_cache()

    def close(self) -> None:
        """Free the engine."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.peft, self.model
        gc.collect()
        torch._dynamo.reset()
