"""Tiny random models and adapters, and their generation with transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model

from reft_kernels.integrations.peft import ReftConfig

VOCABULARY = 256
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM's attention has on the CPU
    "intermediate_size": 192,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "gemma3": (
        "Gemma3Text",
        {
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 32,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "ends": {"positions": "f2+l2", "rank": 4},
    "last": {"positions": "l3", "rank": 2, "layers": [1, 2]},
    "first": {"positions": "f4", "rank": 8, "layers": [0], "intervention": "direft"},
    "prompt": {"positions": "prompt", "rank": 3, "intervention": "nodireft"},
    "everything": {"positions": "all", "rank": 2, "layers": [3]},
    "untied": {"positions": "f3+l1", "rank": 4, "share_weights": False},
    "tanh": {"positions": "f2+l5", "rank": 4, "activation": "tanh"},
    "constant": {"positions": "f1+l1", "rank": 1, "intervention": "consreft"},
}


def make_model(kind: str, folder: Path) -> transformers.PreTrainedModel:
    """Return a random model in fp32, saved to ``folder`` without a tokenizer."""
    name, settings = CONFIGS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**_SIZES, **settings})
    classes = {"Gemma3Text": "Gemma3ForCausalLM"}
    model = getattr(transformers, classes.get(name, f"{name}ForCausalLM"))(config)
    for parameter in model.parameters():  # small weights would make all greedy choices alike
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)
    return model.float().eval()


def make_adapters(
    model: transformers.PreTrainedModel, folder: Path, adapters: dict[str, dict[str, Any]]
) -> PeftModel:
    """Attach adapters with random weights to a model, and save each to ``folder / name``."""
    torch.manual_seed(1)
    peft: PeftModel | None = None
    for name, settings in adapters.items():
        config = ReftConfig(**{"init": None, **settings})
        if peft is None:
            peft = get_peft_model(model, config, adapter_name=name)
        else:
            peft.add_adapter(name, config)
    assert peft is not None
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "representation_edits" in name:
                wide = name.rsplit(".", 2)[-1] in ("W", "W1", "W2") or parameter.dim() > 2
                parameter.normal_(std=0.3 if wide else 2.0)
    peft.save_pretrained(str(folder))
    return peft.eval()


def prompts(lengths: tuple[int, ...], seed: int = 2, vocabulary: int = VOCABULARY) -> list[list]:
    """Return random prompts."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def generate(peft: PeftModel, prompt: list[int], adapter: str | None, count: int) -> list[int]:
    """Return the greedy continuation of a prompt; None is the base model."""
    ids = torch.tensor([prompt])
    arguments: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": count,  # the models have no token that ends a text
        "do_sample": False,
        "pad_token_id": 0,
    }
    if adapter is None:
        with peft.disable_adapter():
            out = peft.generate(**arguments)
    else:
        peft.set_adapter(adapter)
        out = peft.generate(**arguments)
    return out[0, len(prompt) :].tolist()
