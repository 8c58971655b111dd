"""Models with a query transformer, cross-attention to images, or an audio encoder."""

from __future__ import annotations

import torch

from tests.families.catalogue_vlm import (
    AMONG,
    EIGHT,
    GEMMA3,
    IMAGE,
    MARKS,
    QWEN2,
    SIGLIP,
    SMALL,
    mixed,
    pixels,
    seeing,
    words,
)
from tests.families.family import (
    DECODER,
    SPECIAL,
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
    text_config=(None, {**OPT, "model_type": "opt"}),
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
    text_config=(None, {**T5, "model_type": "t5"}),
    labels="",
    scores_tokens=False,
    **BLIP2,
)

# ---- cross-attention to images
TILES = {"aspect_ratio_mask": [[1, 1, 0, 0]], "aspect_ratio_ids": [2]}
RATIOS = [[1, 1], [1, 2], [2, 1], [2, 2], [1, 3], [1, 4], [3, 1], [4, 1]]


def crossed(padding: str, batch: int) -> Batch:
    """An image token followed by text tokens that all attend to the image."""
    tensors = text(padding, batch, (12, 8, 6))
    ids = tensors["input_ids"] = tensors["input_ids"].clamp(max=80)
    mask = tensors.get("attention_mask", torch.ones_like(ids))
    ids[torch.arange(batch), mask.argmax(1)] = IMAGE
    seen = torch.zeros(batch, ids.shape[1], 1, 4, dtype=torch.int64)
    seen[..., :2] = 1
    tensors["cross_attention_mask"] = seen * mask[:, :, None, None]
    return {**tensors, **pixels(1, 4, 3, 8, 8, **TILES)(batch)}


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


def positioned(padding: str, batch: int) -> Batch:
    """Inputs of Kosmos-2, whose image occupies four marked positions after the first token."""
    tensors = text(padding, batch, (12, 9, 8))
    mask = tensors.get("attention_mask", torch.ones_like(tensors["input_ids"]))
    marks = torch.zeros_like(mask)
    for row in range(batch):
        start = int(mask[row].argmax())
        marks[row, start + 1 : start + 5] = 1
    return {**tensors, "image_embeds_position_mask": marks, **EIGHT(batch)}


KOSMOS = {
    "vocab_size": VOCAB,
    "embed_dim": WIDTH,
    "layers": 3,
    "ffn_dim": 64,
    "attention_heads": 4,
    "max_position_embeddings": 128,
    "init_std": 0.15,
    **SPECIAL,
}
seeing(
    "kosmos2",
    "Kosmos2",
    0,
    EIGHT,
    inputs=positioned,
    at="text_model.model.layers",
    text_config=(None, KOSMOS),
    vision_config=(None, SMALL),
    latent_query_num=4,
)

# ---- later Gemma models, with images and text only
GEMMA4 = {
    "head_dim": 8,
    "global_head_dim": 8,
    "sliding_window": 8,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
GEMMA4_VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
    "model_type": "gemma4_vision",
}
GEMMA4_MODEL = {
    "text_config": words("gemma4_text", **GEMMA4),
    "vision_config": (None, GEMMA4_VISION),
    "audio_config": None,
    "image_token_id": IMAGE,
    "video_token_id": 91,
    "boi_token_id": 92,
    "eoi_token_id": 93,
    "audio_token_id": 94,
    "boa_token_id": 95,
    "eoa_token_index": 96,
    "pad_token_id": 0,
}
CORNERS = [[x, y] for y in range(4) for x in range(4)]
PATCHES = pixels(16, 48, image_position_ids=CORNERS)
seeing("gemma4", "Gemma4", 4, PATCHES, **AMONG, **GEMMA4_MODEL)
ALONE = {"note": "text alone"}
seeing("gemma4_alone", "Gemma4", 0, lambda batch: {}, **ALONE, **GEMMA4_MODEL)
seeing(
    "gemma3_alone",
    "Gemma3",
    0,
    lambda batch: {},
    types="token_type_ids",
    text_config=("Gemma3TextConfig", GEMMA3),
    vision_config=SIGLIP,
    mm_tokens_per_image=4,
    pad_token_id=0,
    **ALONE,
    **MARKS,
)
