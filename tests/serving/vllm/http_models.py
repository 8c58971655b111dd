"""A tiny chat model and adapters of it, for the tests over HTTP, and their greedy answers by PEFT."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model

from reft_kernels.integrations.peft import ReftConfig
from tests.tiny_chat import chat_tokenizer

HIDDEN, LAYERS = 64, 4


def save_model(
    folder: Path, hidden_size: int = HIDDEN, layers: int = LAYERS, **settings: Any
) -> Path:
    """Save a random Llama with heads of 32, which vLLM's CPU attention has, and its tokenizer."""
    tokenizer = chat_tokenizer()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": 1,
        "intermediate_size": 2 * hidden_size,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # larger than usual: answers that differ with the prompt
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = transformers.LlamaConfig(**sizes | settings)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(model: Path, folder: Path, seed: int, **options: Any) -> Path:
    """Save an adapter with random weights, whose edits change the model's answers."""
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = {"layers": "all", "rank": 4, "positions": "f2+l2"} | options
    adapted = get_peft_model(base, ReftConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return folder


class Reference:
    """Greedy answers of transformers, with PEFT where an adapter is given.

    Args:
        model: the folder of the model.
    """

    def __init__(self, model: Path) -> None:
        self._folder = model
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self._model = functools.cache(self._load)
        self.tokens = functools.cache(self._tokens)

    def chat_prompt(self, text: str) -> str:
        """Return one message of the user in the chat template."""
        messages = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def _load(self, adapter: Path | None) -> Any:
        base = transformers.AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32)
        return (base if adapter is None else PeftModel.from_pretrained(base, adapter)).eval()

    def _tokens(self, prompt: str, adapter: Path | None, count: int) -> Sequence[int]:
        ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        options = {"max_new_tokens": count, "do_sample": False}
        with torch.no_grad():
            out = self._model(adapter).generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), **options
            )
        return tuple(out[0, ids.shape[1] :].tolist())
