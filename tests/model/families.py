"""Tiny random models of several families, their batches, and a plain version of LoReFT."""

from __future__ import annotations

import contextlib

import torch
import transformers
from torch import nn

VOCAB, WIDTH, LAYERS, BATCH, LENGTH = 97, 32, 3, 3, 24
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        **COMMON, **SPECIAL, intermediate_size=64, num_key_value_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def _qwen3() -> nn.Module:
    config = transformers.Qwen3Config(
        **COMMON, **SPECIAL, intermediate_size=64, num_key_value_heads=2, head_dim=8
    )
    return transformers.Qwen3ForCausalLM(config)


def _gemma3() -> nn.Module:
    config = transformers.Gemma3TextConfig(
        **COMMON,
        **SPECIAL,
        intermediate_size=64,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
    )
    return transformers.Gemma3ForCausalLM(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        **SPECIAL,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def _neox() -> nn.Module:
    config = transformers.GPTNeoXConfig(
        **COMMON, **SPECIAL, intermediate_size=64, max_position_embeddings=64
    )
    return transformers.GPTNeoXForCausalLM(config)


def _bloom() -> nn.Module:
    config = transformers.BloomConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, n_layer=LAYERS, n_head=4, **SPECIAL
    )
    return transformers.BloomForCausalLM(config)


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        **COMMON, **NO_DROPOUT, intermediate_size=64, max_position_embeddings=64, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def _roberta() -> nn.Module:
    config = transformers.RobertaConfig(
        **COMMON,
        **NO_DROPOUT,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=3,
        pad_token_id=0,
    )
    return transformers.RobertaForSequenceClassification(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=LAYERS,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=3,
        **NO_DROPOUT,
    )
    return transformers.ViTForImageClassification(config)


FAMILIES = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "neox": _neox,
    "bloom": _bloom,
    "bert": _bert,
    "roberta": _roberta,
    "t5": _t5,
    "vit": _vit,
}
DECODERS = ("llama", "qwen3", "gemma3", "gpt2", "neox", "bloom")
BLOCKS = {
    "llama": "model.layers",
    "qwen3": "model.layers",
    "gemma3": "model.layers",
    "gpt2": "transformer.h",
    "neox": "gpt_neox.layers",
    "bloom": "transformer.h",
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "t5": "encoder.block",
}


def make(family: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():  # biases of 0 and norms of 1 would hide errors
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def blocks(family: str, model: nn.Module) -> nn.ModuleList:
    if family == "vit":  # its path depends on the version of transformers
        return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)
    return model.get_submodule(BLOCKS[family])


def mask_of(lengths: list[int], side: str = "right", width: int = LENGTH) -> torch.Tensor:
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, (slice(0, length) if side == "right" else slice(width - length, width))] = 1
    return mask


def batch(family: str, seed: int = 1, side: str = "right") -> dict[str, torch.Tensor]:
    """Padded inputs with labels; the prompts have different lengths, some below 14 tokens."""
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        images = torch.randn(BATCH, 3, 16, 16, generator=generator)
        return {"pixel_values": images, "labels": torch.arange(BATCH) % 3}
    mask = mask_of([LENGTH, 15, 9], side)
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator) * mask
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family in DECODERS:
        labels = ids.clone()
        for row, prompt in enumerate([18, 9, 4]):
            start = int(mask[row].argmax())
            labels[row, start : start + prompt] = -100
        inputs["labels"] = labels.masked_fill(mask == 0, -100)
    elif family == "t5":
        inputs["labels"] = torch.randint(3, VOCAB, (BATCH, 6), generator=generator)
    else:
        inputs["labels"] = torch.arange(BATCH) % 3
    return inputs


def prompt_columns(
    family: str, inputs: dict[str, torch.Tensor], first: int, last: int, width: int
) -> list[list[int]]:
    """Columns of each example that f{first}+l{last} selects, by plain loops."""
    chosen = []
    for row in range(next(iter(inputs.values())).shape[0]):
        mask = inputs.get("attention_mask")
        columns = list(range(width)) if mask is None else [c for c in range(width) if mask[row, c]]
        if family in DECODERS and "labels" in inputs:
            supervised = [c for c in columns if inputs["labels"][row, c] != -100]
            columns = [c for c in columns if not supervised or c < supervised[0]]
        n = len(columns) // 2 if first and last else len(columns)
        head, tail = min(first, n), min(last, n)
        chosen.append(columns[:head] + columns[len(columns) - tail :])
    return chosen


def plain_loreft(
    hidden: torch.Tensor,
    columns: list[list[int]],
    R: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor,
):
    """h + R^T (W h + b - R h) at the given columns, out of place, in the dtype of the arguments."""
    edited = hidden.clone()
    for row, chosen in enumerate(columns):
        h = hidden[row, chosen]
        edited[row, chosen] = h + (h @ W.T + b - h @ R.T) @ R
    return edited


@contextlib.contextmanager
def plain_hooks(family: str, model: nn.Module, columns_of, weights):
    """A plain implementation: a temporary hook on each block that gathers, edits and scatters."""
    handles = []
    for layer, block in enumerate(blocks(family, model)):

        def hook(module, args, output, layer=layer):
            hidden = output[0] if isinstance(output, tuple) else output
            columns = columns_of(hidden)
            edited = hidden if columns is None else plain_loreft(hidden, columns, *weights(layer))
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        handles.append(block.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def shake(model: nn.Module, scale: float = 0.3, seed: int = 7) -> None:
    """Add noise to the trainable parameters, so that the adapter is not the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def stacks(model: nn.Module) -> list[nn.Module]:
    """The stacked interventions of a model."""
    return [m for m in model.modules() if type(m).__name__.startswith("Stacked")]


def allowed(plain: torch.Tensor, exact: torch.Tensor) -> float:
    """The tolerance: twice the error of the plain fp32 computation, plus one rounding."""
    error = (plain.double() - exact).abs().max()
    return float(2 * error + torch.finfo(plain.dtype).eps * exact.abs().max())


def within(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> bool:
    return bool((got.double() - exact).abs().max() <= allowed(plain, exact))


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
