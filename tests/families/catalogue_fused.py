"""Models whose images or sounds pass a query transformer, cross-attention or an audio encoder."""

from __future__ import annotations

import torch

from tests.families.catalogue_vlm import EIGHT, IMAGE, QWEN2, SMALL, mixed, pixels, seeing, words
from tests.families.family import (
    DECODER,
    VOCAB,
    WIDTH,
    Batch,
    generator,
    text,
    with_decoder_ids,
)

QFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "cross_attention_frequency": 1,
    "vocab_size": VOCAB,
    "encoder_hidden_size": 24,
}
BLIP2 = {
    "vision_config": (None, {**SMALL, "num_hidden_layers": 4}),
    "qformer_config": (None, QFORMER),
    "num_query_tokens": 4,
    "image_token_index": IMAGE,
}
OPT = {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "intermediate_size")}
OPT |= {"ffn_dim": 64, "word_embed_proj_dim": WIDTH, "dropout": 0.0}
seeing(
    "blip2_opt",
    "Blip2",
    4,
    EIGHT,
    at="language_model.model.decoder.layers",
    text_config=("OPTConfig", OPT),
    note="generate is the language model's own",
    **BLIP2,
)
T5 = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "relative_attention_num_buckets": 8,
}
seeing(
    "blip2_t5",
    "Blip2",
    4,
    EIGHT,
    kind="encoder-decoder",
    at="language_model.encoder.block",
    inputs=lambda padding, batch: with_decoder_ids(mixed(4, EIGHT)(padding, batch), 0),
    text_config=("T5Config", T5),
    labels="",
    scores_tokens=False,
    **BLIP2,
)

# ---- with cross-attention to the images
TILES = {
    "aspect_ratio_mask": [[1, 1, 0, 0]],
    "aspect_ratio_ids": [2],
}
RATIOS = [[1, 1], [1, 2], [2, 1], [2, 2], [1, 3], [1, 4], [3, 1], [4, 1]]


def crossed(padding: str, batch: int) -> Batch:
    """The image's token first, then words that all see it."""
    found = text(padding, batch, (12, 8, 6))
    ids = found["input_ids"] = found["input_ids"].clamp(max=80)
    mask = found.get("attention_mask", torch.ones_like(ids))
    ids[torch.arange(batch), mask.argmax(1)] = IMAGE
    seen = torch.zeros(batch, ids.shape[1], 1, 4, dtype=torch.int64)
    seen[..., :2] = 1
    found["cross_attention_mask"] = seen * mask[:, :, None, None]
    return {**found, **pixels(1, 4, 3, 8, 8, **TILES)(batch)}


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
seeing(
    "mllama",
    "Mllama",
    0,
    EIGHT,
    count=4,
    inputs=crossed,
    text_config=words(
        "mllama_text_model",
        num_hidden_layers=4,
        cross_attention_layers=[1],
        rope_parameters=ROPE,
        rope_scaling=dict(ROPE),
    ),
    vision_config=(
        None,
        {
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_global_layers": 2,
            "attention_heads": 4,
            "intermediate_size": 32,
            "vision_output_dim": 32,
            "image_size": 8,
            "patch_size": 4,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [1],
            "supported_aspect_ratios": RATIOS,
        },
    ),
    image_token_index=IMAGE,
)


def heard(batch: int) -> Batch:
    mel = torch.randn(batch, 8, 40, generator=generator())
    return {"input_features": mel, "feature_attention_mask": torch.ones(batch, 40).long()}


SOUND = {
    "model_type": "qwen2_audio_encoder",
    "num_mel_bins": 8,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "d_model": 24,
    "max_source_positions": 20,
}
AUDIO = {"audio_config": (None, SOUND), "text_config": QWEN2, "audio_token_index": IMAGE}
HEARS = ("model.language_model.layers", "language_model.model.layers")
seeing("qwen2_audio", "Qwen2Audio", 10, heard, at=HEARS, **AUDIO)
