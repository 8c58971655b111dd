"""Tiny random models with tokenizers, made offline and saved to folders: a Llama, a T5 and a BERT
of two layers.

The tokenizer is a byte-level BPE, so that any text survives a round trip. The fixtures
``tiny_llama``, ``tiny_t5`` and ``tiny_bert`` of ``tests/reft_train/conftest.py`` are the folders,
made once a session.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEXT = """the correct answer is true false yes no answer1 answer2 answer3 answer4 solution1 solution2 ending1 ending2
Below is an instruction that describes a task. Write a response that appropriately completes the request. Instruction Response
Please choose the correct answer to the question. Answer format: what how many apples does she have? He has 12 and eats 3"""
POSITIONS = 512


def tokenizer_of(kind: str) -> Any:
    """A tokenizer that adds what ``kind`` adds: "llama" ``<s>`` in front, "t5" ``</s>`` at the
    end, "bert" both of its own.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = {
        "llama": {
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
        },
        "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        "bert": {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
    }[kind]
    tokenizer = Tokenizer(models.BPE(unk_token=specials["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=list(specials.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    single, pair = {
        "llama": ("<s> $A", "<s> $A <s> $B"),
        "t5": ("$A </s>", "$A </s> $B </s>"),
        "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    }[kind]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in specials.values()],
    )
    inputs = (
        ["input_ids", "token_type_ids", "attention_mask"]
        if kind == "bert"
        else ["input_ids", "attention_mask"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=POSITIONS, model_input_names=inputs, **specials
    )


def save_llama(folder: Path, **sizes: int) -> Path:
    """A causal Llama, hidden size 32 unless ``sizes`` say otherwise, with ``<s>``, ``</s>`` and
    ``<pad>``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer_of("llama")
    config = LlamaConfig(
        **{"hidden_size": 32, "intermediate_size": 48, **sizes},
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(LlamaForCausalLM, config, tokenizer, folder)


def save_t5(folder: Path) -> Path:
    """An encoder-decoder T5, hidden size 32."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = tokenizer_of("t5")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(T5ForConditionalGeneration, config, tokenizer, folder)


def save_bert(folder: Path) -> Path:
    """A BERT encoder without a head, hidden size 32."""
    from transformers import BertConfig, BertModel

    tokenizer = tokenizer_of("bert")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    return _save(BertModel, config, tokenizer, folder)


def _save(model_class: Any, config: Any, tokenizer: Any, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same weights whatever ran before
        model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shake(model: Any, scale: float = 0.3) -> Any:
    """Move every trainable vector and matrix away from its start, so that an adapter changes
    what the model says.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    scale * torch.randn(parameter.shape, generator=generator).to(parameter)
                )
    return model
