"""Tiny random models of special families: mixtures, hybrids, several towers, unusual layouts."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

BATCH, LENGTH, TARGETS = 2, 12, 6
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 8,
    "patch_size": 4,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
HYBRID = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2,
}
BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def _of(config: str, model: str, **values) -> nn.Module:
    classes = [getattr(transformers, name, None) for name in (config, model)]
    if None in classes:
        pytest.skip(f"transformers {transformers.__version__} has no {model}")
    return classes[1](classes[0](**values))


def _bert2bert() -> nn.Module:
    encoder = transformers.BertConfig(**{**PLAIN, "num_hidden_layers": 2})
    decoder = transformers.BertConfig(
        **{**PLAIN, "num_hidden_layers": 2}, is_decoder=True, add_cross_attention=True
    )
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.EncoderDecoderModel(config)


def _trocr() -> nn.Module:
    encoder = transformers.ViTConfig(**{**VISION, "num_hidden_layers": 2})
    decoder = transformers.TrOCRConfig(
        vocab_size=99,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        cross_attention_hidden_size=24,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.VisionEncoderDecoderModel(config)


def _clip(kind: str = "CLIPModel") -> nn.Module:
    config = transformers.CLIPConfig(
        text_config={**PLAIN, "projection_dim": 16}, vision_config=VISION, projection_dim=16
    )
    return getattr(transformers, kind)(config)


def _llava() -> nn.Module:
    text, vision = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=98, image_seq_length=4
    )
    return transformers.LlavaForConditionalGeneration(config)


def _blip2(text) -> nn.Module:
    qformer = {**PLAIN, "num_hidden_layers": 3, "encoder_hidden_size": 24}
    config = transformers.Blip2Config(
        vision_config={**VISION, "num_hidden_layers": 2},
        qformer_config=qformer,
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=98,
    )
    return transformers.Blip2ForConditionalGeneration(config)


MODELS = {
    "mixtral": lambda: _of("MixtralConfig", "MixtralForCausalLM", **TEXT, num_local_experts=4),
    "qwen2_moe": lambda: _of(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        **TEXT,
        **EXPERTS,
        shared_expert_intermediate_size=32,
        decoder_sparse_step=2,
    ),
    "deepseek_v3": lambda: _of("DeepseekV3Config", "DeepseekV3ForCausalLM", **{**TEXT, **MLA}),
    "granitemoe": lambda: _of(
        "GraniteMoeConfig", "GraniteMoeForCausalLM", **TEXT, num_local_experts=4
    ),
    "gpt_oss": lambda: _of(
        "GptOssConfig",
        "GptOssForCausalLM",
        **TEXT,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "llama4": lambda: _of(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        **TEXT,
        head_dim=8,
        intermediate_size_mlp=64,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=64,
    ),
    "switch": lambda: _of(
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        **T5,
        num_experts=4,
        expert_capacity=64,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    "longcat_flash": lambda: _of(
        "LongcatFlashConfig",
        "LongcatFlashForCausalLM",
        **{
            **TEXT,
            "num_hidden_layers": 4,
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 32,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 8,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "num_key_value_heads": 4,
        },
    ),
    "qwen3_next": lambda: _of(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        **TEXT,
        **EXPERTS,
        **HYBRID,
        shared_expert_intermediate_size=32,
    ),
    "lfm2": lambda: _of(
        "Lfm2Config",
        "Lfm2ForCausalLM",
        **TEXT,
        layer_types=["conv", "full_attention", "conv"],
        block_ff_dim=64,
        block_multiple_of=8,
        conv_L_cache=3,
    ),
    "recurrent_gemma": lambda: _of(
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        **TEXT,
        head_dim=8,
        lru_width=32,
        attention_window_size=8,
        conv1d_width=2,
        block_types=["recurrent", "attention", "recurrent"],
    ),
    "minimax": lambda: _of(
        "MiniMaxConfig",
        "MiniMaxForCausalLM",
        **TEXT,
        num_local_experts=4,
        head_dim=8,
        block_size=4,
        layer_types=HYBRID["layer_types"],
    ),
    "kimi_linear": lambda: _of(
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        **{
            **TEXT,
            **MLA,
            "q_lora_rank": None,
            "num_experts": 4,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "linear_conv_kernel_dim": 2,
            "layer_types": HYBRID["layer_types"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "zamba": lambda: _of(
        "ZambaConfig",
        "ZambaForCausalLM",
        **{
            **TEXT,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "mamba_d_state": 8,
            "mamba_d_conv": 2,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
            "n_mamba_heads": 2,
            "use_mamba_kernels": False,
            "num_key_value_heads": 4,
        },
    ),
    "mamba": lambda: _of(
        "MambaConfig",
        "MambaForCausalLM",
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=3,
        state_size=8,
    ),
    "rwkv": lambda: _of(
        "RwkvConfig", "RwkvForCausalLM", vocab_size=99, hidden_size=32, num_hidden_layers=3
    ),
    "opt": lambda: _of("OPTConfig", "OPTForCausalLM", **PLAIN, **OPT),
    "bart": lambda: _of("BartConfig", "BartForConditionalGeneration", **BART),
    "pegasus_x": lambda: _of(
        "PegasusXConfig",
        "PegasusXForConditionalGeneration",
        **BART,
        num_global_tokens=4,
        block_size=8,
    ),
    "led": lambda: _of(
        "LEDConfig",
        "LEDForConditionalGeneration",
        **BART,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        attention_window=8,
    ),
    "prophetnet": lambda: _of(
        "ProphetNetConfig",
        "ProphetNetForConditionalGeneration",
        vocab_size=99,
        hidden_size=32,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
    ),
    "albert": lambda: _of(
        "AlbertConfig", "AlbertForSequenceClassification", **PLAIN, embedding_size=16
    ),
    "mobilebert": lambda: _of(
        "MobileBertConfig",
        "MobileBertForSequenceClassification",
        **PLAIN,
        embedding_size=32,
        intra_bottleneck_size=16,
        true_hidden_size=16,
    ),
    "longformer": lambda: _of(
        "LongformerConfig", "LongformerForMaskedLM", **PLAIN, attention_window=8
    ),
    "xlnet": lambda: _of(
        "XLNetConfig",
        "XLNetLMHeadModel",
        vocab_size=99,
        d_model=32,
        n_layer=3,
        n_head=4,
        d_inner=64,
    ),
    "deepseek_v4": lambda: _of("DeepseekV4Config", "DeepseekV4ForCausalLM", **TEXT),
    "gemma3n": lambda: _of(
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        **{
            **TEXT,
            "intermediate_size": [64] * 3,
            "head_dim": 8,
            "vocab_size_per_layer_input": 99,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 3,
        },
    ),
    "squeezebert": lambda: _of(
        "SqueezeBertConfig",
        "SqueezeBertModel",
        **PLAIN,
        embedding_size=32,
        q_groups=1,
        k_groups=1,
        v_groups=1,
        post_attention_groups=1,
        intermediate_groups=1,
        output_groups=1,
    ),
    "funnel": lambda: _of(
        "FunnelConfig",
        "FunnelModel",
        vocab_size=99,
        block_sizes=[1, 1],
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=64,
    ),
    "xlm": lambda: _of("XLMConfig", "XLMModel", vocab_size=99, emb_dim=32, n_layers=3, n_heads=4),
    "vilt": lambda: _of("ViltConfig", "ViltModel", **PLAIN, image_size=16, patch_size=4),
    "swin": lambda: _of(
        "SwinConfig",
        "SwinForImageClassification",
        image_size=16,
        patch_size=2,
        embed_dim=16,
        depths=[1, 2, 1],
        num_heads=[2, 2, 2],
        window_size=2,
    ),
    "convnext": lambda: _of(
        "ConvNextConfig",
        "ConvNextModel",
        hidden_sizes=[16, 32],
        depths=[1, 1],
        num_stages=2,
        image_size=32,
    ),
    "segformer": lambda: _of(
        "SegformerConfig",
        "SegformerModel",
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[16, 32],
        sr_ratios=[2, 1],
        num_attention_heads=[2, 2],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
    ),
    "wav2vec2": lambda: _of(
        "Wav2Vec2Config",
        "Wav2Vec2Model",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
    ),
    "whisper": lambda: _of(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        **BART,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=32,
    ),
    "bert2bert": _bert2bert,
    "trocr": _trocr,
    "clip": _clip,
    "clip_images": lambda: _clip("CLIPForImageClassification"),
    "llava": _llava,
    "blip2_opt": lambda: _blip2(transformers.OPTConfig(**PLAIN, **OPT)),
    "blip2_t5": lambda: _blip2(transformers.T5Config(**T5)),
}

_IMAGES = {
    "clip": 8,
    "clip_images": 8,
    "llava": 8,
    "blip2_opt": 8,
    "blip2_t5": 8,
    "trocr": 8,
    "swin": 16,
}
_NO_TOKENS = ("clip_images", "trocr", "swin", "wav2vec2", "whisper")
_TWO_SIDES = (
    "bart",
    "pegasus_x",
    "led",
    "prophetnet",
    "switch",
    "bert2bert",
    "trocr",
    "whisper",
    "blip2_t5",
)


def make(family: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[family]().eval()


def batch(family: str) -> dict[str, torch.Tensor]:
    """Inputs of a family, two examples: 12 tokens, images or audio, 6 tokens for a decoder."""
    generator = torch.Generator().manual_seed(1)
    inputs = {}
    if family not in _NO_TOKENS:
        inputs["input_ids"] = torch.randint(3, 90, (BATCH, LENGTH), generator=generator)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if family in ("llava", "blip2_opt", "blip2_t5"):
            inputs["input_ids"][:, :4] = 98
    if family in _IMAGES:
        inputs["pixel_values"] = torch.randn(
            BATCH, 3, _IMAGES[family], _IMAGES[family], generator=generator
        )
    if family == "wav2vec2":
        inputs["input_values"] = torch.randn(BATCH, 400, generator=generator)
    if family == "whisper":
        inputs["input_features"] = torch.randn(BATCH, 8, 40, generator=generator)
    if family in _TWO_SIDES:
        inputs["decoder_input_ids"] = torch.randint(3, 90, (BATCH, TARGETS), generator=generator)
    return inputs
