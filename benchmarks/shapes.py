"""Models that several suites measure: small Llama-like models and two Llama configurations."""

from __future__ import annotations

import torch

from benchmarks.models import Shape

LLAMA_1B = Shape("llama-3.2-1b", 2048, 16, 32, 8, 8192, 128256, 8, 512, dtype=torch.bfloat16)
LLAMA_8B = Shape("llama-3-8b", 4096, 32, 32, 8, 14336, 128256, 4, 512, dtype=torch.bfloat16)


def small(hidden: int, layers: int = 4, batch: int = 4, length: int = 64) -> Shape:
    """Return a model for a CPU: heads of width 64, Llama's proportions, a vocabulary of 8192."""
    heads = hidden // 64
    return Shape(
        f"llama-{hidden}x{layers}",
        hidden,
        layers,
        heads,
        heads,
        hidden * 11 // 4,
        8192,
        batch,
        length,
    )


QUICK = small(128, 2, 2, 32)
