"""Vision-language and audio-language models that insert a tower's features among the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.families.family import (
    DECODER,
    VERSION_5,
    WIDTH,
    Batch,
    Family,
    add,
    generator,
    padding_mask,
    paths,
    split,
    text_tokens,
    transformers_class,
)

IMAGE = 90  # token id of the placeholder; token ids of text are below 88
WORDS = (8, 5, 3)
Pixels = Callable[[int], Batch]


def mixed(
    count: int, pixels: Pixels, types: str = "", before: tuple = (1,), after: tuple = ()
) -> Callable[[str, int], Batch]:
    """Batches of a prefix, ``count`` placeholders, a suffix and text, with inputs of the tower."""

    def inputs(padding: str, batch: int) -> Batch:
        head = [*before, *[IMAGE] * count, *after]
        width = len(head) + max(WORDS)
        words = [WORDS[0]] * batch if padding == "none" else list(WORDS[:batch])
        mask = padding_mask([len(head) + n for n in words], padding, width)
        ids, draw = torch.zeros_like(mask), generator(11)
        for row, n in enumerate(words):
            tail = torch.randint(5, 80, (n,), generator=draw).tolist()
            ids[row, mask[row].bool()] = torch.tensor(head + tail)
        tensors: Batch = {"input_ids": ids, **pixels(batch)}
        if padding != "none":
            tensors["attention_mask"] = mask
        if types:
            tensors[types] = (ids == IMAGE).long()
        return tensors

    return inputs


def pixels(*shape: int, **more: Any) -> Pixels:
    """Random images, and other inputs repeated for each example."""

    def make(batch: int) -> Batch:
        repeated = {k: torch.tensor([v] * batch) for k, v in more.items()}
        return {"pixel_values": torch.randn(batch, *shape, generator=generator()), **repeated}

    return make


def seeing(name: str, prefix: str, holders: int, read: Pixels, **keywords: Any) -> None:
    """Add a vision-language model.

    Settings whose name ends in ``_config`` are (class name or None, settings); with None they are
    passed as a dictionary.
    """
    family, settings = split(keywords)
    where = {k: settings.pop(k) for k in ("types", "before", "after") if k in settings}

    def make() -> nn.Module:
        arguments = {}
        for key, value in settings.items():
            if isinstance(value, tuple):
                value = value[1] if value[0] is None else transformers_class(value[0])(**value[1])
            arguments[key] = value
        model = transformers_class(family.get("config", f"{prefix}ForConditionalGeneration"))
        return model(transformers_class(f"{prefix}Config")(**arguments))

    common: dict[str, Any] = {
        "kind": "vision-language",
        "inputs": mixed(holders, read, **where),
        "count": 3,
        "tokens": text_tokens,
        "generates": True,
        "labels": "prompt",
        "scores_tokens": True,
        **{k: v for k, v in family.items() if k not in ("at", "config")},
    }
    at = family.get("at", "model.language_model.layers")
    add(Family(name=name, make=make, blocks=paths(at), **common))


LLAMA = ("LlamaConfig", DECODER)
QWEN2 = ("Qwen2Config", DECODER)
SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 4,
}
LARGER = {**SMALL, "image_size": 16}
CLIP = ("CLIPVisionConfig", {**SMALL, "projection_dim": 16})
SIGLIP = ("SiglipVisionConfig", {**SMALL, "vision_use_head": False})
LLAVA = {"text_config": LLAMA, "vision_config": CLIP, "image_token_index": IMAGE, "pad_token_id": 0}
LLAVA["image_seq_length"] = 4
EIGHT, SIXTEEN = pixels(3, 8, 8), pixels(3, 16, 16)
seeing("llava", "Llava", 4, EIGHT, **LLAVA)
TOWER = "model.vision_tower.encoder.layers"
if not VERSION_5:
    TOWER = "model.vision_tower.vision_model.encoder.layers"
seeing(
    "llava_images",
    "Llava",
    4,
    EIGHT,
    at=TOWER,
    component=f"{TOWER}.{{layer}}",
    tokens=None,
    labels="",
    generates=False,
    vision_feature_layer=-1,
    note="the tower by its path, narrower than the text's model",
    **LLAVA,
)
seeing("vipllava", "VipLlava", 4, EIGHT, vision_feature_layers=[-1, -2], **LLAVA)
NEXT = pixels(5, 3, 8, 8, image_sizes=[16, 16])
PINS = {"image_grid_pinpoints": [[16, 16]]}
seeing("llava_next", "LlavaNext", 24, NEXT, **PINS, **LLAVA)
seeing(
    "llava_onevision",
    "LlavaOnevision",
    24,
    NEXT,
    text_config=QWEN2,
    vision_config=SIGLIP,
    image_token_index=IMAGE,
    video_token_index=91,
    pad_token_id=0,
    **PINS,
)


# ---- Qwen and GLM: flattened patches, three-dimensional positions


def patches(batch: int) -> Batch:
    """Images of 4 by 4 patches with 4 by 4 pixels and two frames each."""
    rows = torch.randn(batch * 16, 3 * 2 * 4 * 4, generator=generator())
    return {"pixel_values": rows, "image_grid_thw": torch.tensor([[1, 4, 4]] * batch)}


def sections(spread: list[int], **more: Any) -> dict[str, Any]:
    """Settings of three-dimensional rotary embeddings, for both major versions."""
    both = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": spread, **more}
    return {"rope_parameters": both, "rope_scaling": dict(both), "rope_theta": 10000.0}


AMONG = {"types": "mm_token_type_ids" if VERSION_5 else "", "before": (1, 92), "after": (93,)}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
    "pad_token_id": 0,
}
GRID = {"num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def words(kind: str, **more: Any) -> tuple[None, dict[str, Any]]:
    return None, {**DECODER, "model_type": kind, **more}


seeing(
    "qwen2_vl",
    "Qwen2VL",
    4,
    patches,
    text_config=words("qwen2_vl_text", tie_word_embeddings=False, **sections([2, 1, 1])),
    vision_config=(
        None,
        {"depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2, **GRID},
    ),
    **AMONG,
    **TOKENS,
)
DEEP = {"depth": 2, "hidden_size": 32, "out_hidden_size": WIDTH, "intermediate_size": 48, **GRID}
seeing(
    "qwen2_5_vl",
    "Qwen2_5_VL",
    4,
    patches,
    text_config=words("qwen2_5_vl_text", tie_word_embeddings=False, **sections([2, 1, 1])),
    vision_config=(None, {**DEEP, "window_size": 16, "fullatt_block_indexes": [1]}),
    **AMONG,
    **TOKENS,
)
STACKED = {**DEEP, "depth": 3, "num_position_embeddings": 16}
LAYERED = (None, {**STACKED, "deepstack_visual_indexes": [0, 1]})
WOVEN = {"head_dim": 8, **sections([2, 1, 1], mrope_interleaved=True)}
seeing(
    "qwen3_vl",
    "Qwen3VL",
    4,
    patches,
    text_config=words("qwen3_vl_text", **WOVEN),
    vision_config=LAYERED,
    note="features of the images are added between blocks",
    **AMONG,
    **TOKENS,
)
MIX = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
seeing(
    "qwen3_vl_moe",
    "Qwen3VLMoe",
    4,
    patches,
    text_config=words("qwen3_vl_moe_text", decoder_sparse_step=1, **MIX, **WOVEN),
    vision_config=LAYERED,
    **AMONG,
    **TOKENS,
)
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 8,
}
HALF = sections([1, 1, 0], mrope_interleaved=True, partial_rotary_factor=0.5)
seeing(
    "qwen3_5",
    "Qwen3_5",
    4,
    patches,
    text_config=words("qwen3_5_text", **LINEAR, **HALF),
    vision_config=(None, STACKED),
    **AMONG,
    **TOKENS,
)
seeing(
    "glm4v",
    "Glm4v",
    4,
    patches,
    text_config=words("glm4v_text", **sections([2, 1, 1], partial_rotary_factor=1.0)),
    vision_config=(None, {**DEEP, "image_size": 16}),
    image_token_id=IMAGE,
    video_token_id=91,
    image_start_token_id=92,
    image_end_token_id=93,
    video_start_token_id=94,
    video_end_token_id=95,
    pad_token_id=0,
    **AMONG,
)

# ---- Gemma
GEMMA = {**DECODER, "head_dim": 8}
seeing(
    "paligemma",
    "PaliGemma",
    4,
    EIGHT,
    before=(),
    text_config=("GemmaConfig", GEMMA),
    vision_config=("SiglipVisionConfig", {**SIGLIP[1], "projection_dim": WIDTH}),
    image_token_index=IMAGE,
    projection_dim=WIDTH,
    hidden_size=WIDTH,
    pad_token_id=0,
    note="position ids start at 1",
)
GEMMA3 = {
    **GEMMA,
    "sliding_window": 8,
    "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
MARKS = {"boi_token_index": 92, "eoi_token_index": 93, "image_token_index": IMAGE}
seeing(
    "gemma3",
    "Gemma3",
    4,
    EIGHT,
    types="token_type_ids",
    before=(1, 92),
    after=(93,),
    text_config=("Gemma3TextConfig", GEMMA3),
    vision_config=SIGLIP,
    mm_tokens_per_image=4,
    pad_token_id=0,
    **MARKS,
)

# ---- others
IDEFICS = {"image_token_id": IMAGE, "pad_token_id": 0, "at": "model.text_model.layers"}
ONE = pixels(1, 3, 16, 16)
PLAIN = (None, LARGER)
seeing(
    "idefics3",
    "Idefics3",
    4,
    ONE,
    text_config=LLAMA,
    vision_config=PLAIN,
    scale_factor=2,
    **IDEFICS,
)
seeing(
    "smolvlm", "SmolVLM", 4, ONE, text_config=LLAMA, vision_config=PLAIN, scale_factor=2, **IDEFICS
)
MISTRAL = ("MistralConfig", GEMMA)
RESAMPLER = {
    "hidden_size": WIDTH,
    "resampler_n_latents": 4,
    "resampler_depth": 2,
    "resampler_n_heads": 2,
    "resampler_head_dim": 8,
    "num_key_value_heads": 2,
}
seeing(
    "idefics2",
    "Idefics2",
    4,
    ONE,
    text_config=MISTRAL,
    vision_config=PLAIN,
    perceiver_config=(None, RESAMPLER),
    **IDEFICS,
)
SQUARE = {**LARGER, "image_size": [16, 16], "patch_size": [4, 4]}
INTERN = {
    "text_config": QWEN2,
    "image_token_id": IMAGE,
    "image_seq_length": 4,
    "downsample_ratio": 0.5,
    "pad_token_id": 0,
}
seeing("internvl", "InternVL", 4, SIXTEEN, vision_config=("InternVLVisionConfig", SQUARE), **INTERN)
seeing(
    "internvl_wide",
    "InternVL",
    4,
    SIXTEEN,
    vision_config=("InternVLVisionConfig", {**SQUARE, "hidden_size": 64, "intermediate_size": 256}),
    note="the tower is wider than the text's model",
    **INTERN,
)
seeing(
    "mistral3",
    "Mistral3",
    4,
    pixels(3, 16, 16, image_sizes=[16, 16]),
    text_config=MISTRAL,
    vision_config=("PixtralVisionConfig", {**LARGER, "hidden_size": 32}),
    image_token_index=IMAGE,
    spatial_merge_size=2,
    pad_token_id=0,
)
ALTERNATE = ["sliding_attention", "full_attention", "sliding_attention"]
seeing(
    "aya_vision",
    "AyaVision",
    4,
    SIXTEEN,
    text_config=("Cohere2Config", {**DECODER, "sliding_window": 8, "layer_types": ALTERNATE}),
    vision_config=("SiglipVisionConfig", {**LARGER, "vision_use_head": False}),
    image_token_index=IMAGE,
    downsample_factor=2,
    vision_feature_select_strategy="full",
    pad_token_id=0,
)
LLAMA4 = {
    "head_dim": 8,
    "intermediate_size_mlp": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 64,
    "no_rope_layers": [1, 0, 1],
}
LLAMA4_VISION = {
    **LARGER,
    "hidden_size": 32,
    "intermediate_size": 128,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "pixel_shuffle_ratio": 0.5,
}
seeing(
    "llama4",
    "Llama4",
    4,
    SIXTEEN,
    at=("language_model.model.layers", "model.language_model.layers"),
    text_config=words("llama4_text", **LLAMA4),
    vision_config=(None, LLAMA4_VISION),
    pad_token_id=0,
    **MARKS,
)
CONVS = {**DECODER, "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3}
LFM_VISION = {k: v for k, v in SMALL.items() if k != "image_size"}
seeing(
    "lfm2_vl",
    "Lfm2Vl",
    4,
    pixels(16, 48, spatial_shapes=[4, 4], pixel_attention_mask=[1] * 16),
    text_config=("Lfm2Config", CONVS),
    vision_config=(
        "Siglip2VisionConfig",
        {**LFM_VISION, "num_patches": 16, "vision_use_head": False},
    ),
    image_token_id=IMAGE,
    downsample_factor=2,
    projector_hidden_size=32,
    pad_token_id=0,
)
seeing(
    "fuyu_text",
    "Fuyu",
    0,
    lambda batch: {},
    config="FuyuForCausalLM",
    text_config=words("persimmon"),
    image_size=16,
    patch_size=4,
    image_token_id=IMAGE,
    pad_token_id=0,
    note="text alone",
)
