"""Text decoders, with about three blocks each."""

from __future__ import annotations

from typing import Any

from tests.families.family import (
    DECODER,
    GPT2,
    VERSION_5,
    VOCAB,
    WIDTH,
    Family,
    add,
    maker,
    paths,
    rope,
    split,
    text,
    text_tokens,
)


def decoder(name: str, classes: str | tuple[str, str], **keywords: Any) -> None:
    """Add a decoder; "Llama" means LlamaConfig and LlamaForCausalLM."""
    family, settings = split(keywords)
    config, model = (
        (f"{classes}Config", f"{classes}ForCausalLM") if isinstance(classes, str) else classes
    )
    at, base = family.pop("at", "model.layers"), family.pop("base", DECODER)
    common = {
        "kind": "decoder",
        "inputs": text,
        "count": 3,
        "tokens": text_tokens,
        "generates": True,
        "labels": "prompt",
        "scores_tokens": True,
    }
    make = maker(model, config, {**base, **settings})
    add(Family(name=name, make=make, blocks=paths(at), **{**common, **family}))


HEAD = {"head_dim": 8}
SLIDES = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
SLIDES["layer_types"] = SLIDES["layer_types"][:3]
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {"shared_expert_intermediate_size": 32}
ROUTED = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    **ROUTED,
}
DENSE_FIRST = {"first_k_dense_replace": 1}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
SSM = {"mamba_d_state": 8, "mamba_d_conv": 2}
SSM2 = {**SSM, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
MAMBA = {"state_size": 8, "conv_kernel": 4, "expand": 2}
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONVS = ["conv", "full_attention", "conv"]

# ---- attention and dense feed-forwards
decoder("llama", "Llama")
decoder("mistral", "Mistral", sliding_window=8, **HEAD)
decoder("ministral", "Ministral", **HEAD, **SLIDES)
decoder("qwen2", "Qwen2")
decoder("qwen3", "Qwen3", **HEAD)
decoder("gemma", "Gemma", **HEAD)
decoder("gemma2", "Gemma2", sliding_window=8, query_pre_attn_scalar=8, **HEAD)
decoder(
    "gemma3_text",
    ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    query_pre_attn_scalar=8,
    **HEAD,
    **SLIDES,
)
PER_LAYER = {
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
decoder(
    "gemma3n_text",
    ("Gemma3nTextConfig", "Gemma3nForCausalLM"),
    layout="sbtd",
    laurel_rank=4,
    altup_num_inputs=4,
    activation_sparsity_pattern=[0.0] * 3,
    intermediate_size=[64] * 3,
    note="four streams beside each other, all edited",
    **HEAD,
    **PER_LAYER,
)
decoder(
    "gemma4_text", ("Gemma4TextConfig", "Gemma4ForCausalLM"), global_head_dim=8, **HEAD, **PER_LAYER
)
decoder("vaultgemma", "VaultGemma", sliding_window=8, **HEAD)
decoder("phi", "Phi")
decoder("phi3", "Phi3")
TRANSFORMER = {"at": "transformer.h"}
decoder(
    "falcon",
    "Falcon",
    new_decoder_architecture=False,
    multi_query=True,
    parallel_attn=True,
    bias=False,
    **TRANSFORMER,
)
decoder("falcon_new", "Falcon", new_decoder_architecture=True, num_kv_heads=2, **TRANSFORMER)
decoder(
    "falcon_alibi",
    "Falcon",
    alibi=True,
    new_decoder_architecture=False,
    parallel_attn=False,
    **TRANSFORMER,
)
MPT = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "n_layers": 3,
    "n_heads": 4,
    "max_seq_len": 128,
    "initializer_range": 0.15,
}
decoder("mpt", "Mpt", at="transformer.blocks", base=MPT, expansion_ratio=2, **SPECIAL_IDS)
decoder("bloom", "Bloom", n_layer=3, n_head=4, **TRANSFORMER)
OLD = {"base": GPT2, **TRANSFORMER}
decoder("gptj", "GPTJ", rotary_dim=4, **OLD)
decoder("codegen", "CodeGen", rotary_dim=4, **OLD)
decoder("gpt_bigcode", "GPTBigCode", **OLD)
decoder("gpt2", ("GPT2Config", "GPT2LMHeadModel"), **OLD)
decoder("openai_gpt", ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel"), **OLD)
decoder("ctrl", ("CTRLConfig", "CTRLLMHeadModel"), dff=64, **OLD)
decoder(
    "gpt_neo",
    "GPTNeo",
    num_layers=3,
    num_heads=4,
    attention_types=[[["global", "local", "global"], 1]],
    window_size=8,
    **TRANSFORMER,
)
decoder("gpt_neox", "GPTNeoX", at="gpt_neox.layers")
decoder(
    "gpt_neox_japanese",
    "GPTNeoXJapanese",
    at="gpt_neox_japanese.layers",
    intermediate_multiple_size=2,
)
decoder("opt", "OPT", at="model.decoder.layers", ffn_dim=64, word_embed_proj_dim=WIDTH)
decoder(
    "opt_projected",
    "OPT",
    at="model.decoder.layers",
    ffn_dim=64,
    word_embed_proj_dim=16,
    do_layer_norm_before=False,
)
decoder("olmo", "Olmo")
decoder("olmo2", "Olmo2")
decoder("olmo3", "Olmo3", **SLIDES)
decoder("stablelm", "StableLm")
decoder("starcoder2", "Starcoder2")
decoder("cohere", "Cohere")
decoder("cohere2", "Cohere2", **SLIDES)
decoder("glm", "Glm", **HEAD)
decoder("glm4", "Glm4", **HEAD)
decoder("granite", "Granite")
decoder("nemotron", "Nemotron", **HEAD)
decoder("persimmon", "Persimmon")
decoder("smollm3", "SmolLM3", no_rope_layers=[1, 0, 1])
decoder("exaone4", "Exaone4", **SLIDES)
decoder("ernie4_5", "Ernie4_5", **HEAD)
decoder("helium", "Helium", **HEAD)
decoder("arcee", "Arcee")
decoder("apertus", "Apertus")
decoder("seed_oss", "SeedOss", **HEAD)
decoder("nanochat", "NanoChat")
decoder("bitnet", "BitNet")
decoder("diffllama", "DiffLlama")
decoder("hunyuan_dense", "HunYuanDenseV1", **HEAD)
decoder("xglm", "XGLM", d_model=WIDTH, ffn_dim=64, num_layers=3, attention_heads=4)
decoder("biogpt", "BioGpt", at="biogpt.layers")
decoder("modernbert_decoder", "ModernBertDecoder", local_attention=8, global_attn_every_n_layers=2)
decoder("bert_decoder", ("BertConfig", "BertLMHeadModel"), at="bert.encoder.layer", is_decoder=True)
decoder("roberta_decoder", "Roberta", at="roberta.encoder.layer", is_decoder=True)
decoder(
    "xlnet",
    ("XLNetConfig", "XLNetLMHeadModel"),
    at="transformer.layer",
    base={**MPT, **SPECIAL_IDS},
    n_layer=3,
    n_head=4,
    d_inner=64,
    layout="tbd",
    generates=False,
    note="time stands first",
)
decoder(
    "hrm_text",
    "HrmText",
    at="model.L_module.layers",
    count=2,
    num_hidden_layers=2,
    H_cycles=2,
    L_cycles=2,
    prefix_lm=False,
    note="its blocks run several times",
    **HEAD,
)

# ---- mixtures of experts
decoder("mixtral", "Mixtral", **LOCAL)
decoder("phimoe", "Phimoe", **LOCAL)
decoder("granitemoe", "GraniteMoe", **LOCAL)
decoder("minimax_m2", "MiniMaxM2", **LOCAL, **HEAD)
decoder("gpt_oss", "GptOss", **LOCAL, **HEAD, **SLIDES)
decoder("qwen2_moe", "Qwen2Moe", decoder_sparse_step=2, **EXPERTS, **SHARED)
decoder("qwen3_moe", "Qwen3Moe", **EXPERTS, **HEAD)
decoder("olmoe", "Olmoe", num_experts=4, num_experts_per_tok=2)
decoder("flex_olmo", "FlexOlmo", num_experts=4, num_experts_per_tok=2)
decoder("deepseek_v2", "DeepseekV2", topk_method="greedy", norm_topk_prob=False, **LATENT)
decoder("deepseek_v3", "DeepseekV3", **LATENT, **DENSE_FIRST)
decoder("deepseek_v4", "DeepseekV4", layout="btsd", note="several streams, all edited")
decoder("glm4_moe", "Glm4Moe", **HEAD, **ROUTED, **DENSE_FIRST)
decoder("dots1", "Dots1", **HEAD, **ROUTED, **DENSE_FIRST)
decoder(
    "ernie4_5_moe",
    "Ernie4_5_Moe",
    moe_num_experts=4,
    moe_k=2,
    moe_intermediate_size=32,
    moe_num_shared_experts=1,
    moe_layer_start_index=1,
)
decoder("hunyuan_moe", "HunYuanMoEV1", num_experts=4, moe_topk=2, **HEAD)
decoder("jetmoe", "JetMoe", kv_channels=8, **LOCAL)
decoder("doge", "Doge")
decoder(
    "dbrx",
    "Dbrx",
    at="transformer.blocks",
    base={**MPT, **SPECIAL_IDS},
    attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}
    | ({"hidden_size": WIDTH} if VERSION_5 else {}),
)
decoder(
    "llama4_text",
    ("Llama4TextConfig", "Llama4ForCausalLM"),
    intermediate_size_mlp=64,
    num_local_experts=4,
    num_experts_per_tok=1,
    interleave_moe_layer_step=2,
    attention_chunk_size=8,
    no_rope_layers=[1, 0, 1],
    **HEAD,
)
decoder(
    "longcat_flash",
    "LongcatFlash",
    ffn_hidden_size=64,
    expert_ffn_hidden_size=32,
    num_layers=3,
    num_hidden_layers=6,
    zero_expert_num=2,
    moe_topk=2,
    **HEAD,
    **{k: v for k, v in LATENT.items() if k not in ROUTED or k == "n_routed_experts"},
)

# ---- state spaces, recurrences and their mixtures with attention
decoder("qwen3_next", "Qwen3Next", **HEAD, **EXPERTS, **SHARED, **LINEAR)
PARTIAL = rope(mrope_section=[1, 1, 0], mrope_interleaved=True, partial_rotary_factor=0.5)
decoder("qwen3_5_text", ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"), **HEAD, **LINEAR, **PARTIAL)
decoder(
    "qwen3_5_moe_text",
    ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
    **HEAD,
    **EXPERTS,
    **SHARED,
    **LINEAR,
    **PARTIAL,
)
decoder("olmo_hybrid", "OlmoHybrid", **LINEAR)
decoder(
    "kimi_linear",
    "KimiLinear",
    linear_head_dim=8,
    linear_num_heads=4,
    linear_conv_kernel_dim=2,
    num_experts=4,
    layer_types=LINEAR["layer_types"],
    mlp_layer_types=["dense", "sparse", "sparse"],
    **{**LATENT, "q_lora_rank": None, "n_group": ...},
)
decoder(
    "falcon_h1",
    "FalconH1",
    mamba_d_ssm=32,
    mamba_expand=2,
    attention_in_multiplier=1.0,
    key_multiplier=1.0,
    ssm_in_multiplier=1.0,
    **HEAD,
    **{**SSM2, "mamba_n_heads": 4},
)
BACKBONE = {"at": "backbone.layers"}
decoder("mamba", "Mamba", time_step_rank=4, use_mambapy=False, **MAMBA, **BACKBONE)
decoder("falcon_mamba", "FalconMamba", time_step_rank=4, **MAMBA, **BACKBONE)
decoder("mamba2", "Mamba2", num_heads=8, n_groups=1, chunk_size=8, **HEAD, **MAMBA, **BACKBONE)
decoder("rwkv", "Rwkv", at="rwkv.blocks", attention_hidden_size=WIDTH, context_length=128)
decoder(
    "recurrent_gemma",
    "RecurrentGemma",
    lru_width=32,
    attention_window_size=8,
    conv1d_width=2,
    block_types=["recurrent", "attention", "recurrent"],
    w_init_variance_scale=0.01,
    **HEAD,
)
decoder("bamba", "Bamba", attn_layer_indices=[1], **SSM2)
decoder(
    "granitemoehybrid",
    "GraniteMoeHybrid",
    shared_intermediate_size=32,
    layer_types=["mamba", "attention", "mamba"],
    **LOCAL,
    **SSM2,
)
decoder(
    "jamba",
    "Jamba",
    count=4,
    num_hidden_layers=4,
    attn_layer_period=2,
    attn_layer_offset=1,
    expert_layer_period=2,
    expert_layer_offset=1,
    num_experts=4,
    num_experts_per_tok=2,
    mamba_expand=2,
    use_mamba_kernels=False,
    **SSM,
)
decoder("lfm2", "Lfm2", layer_types=CONVS, block_ff_dim=64, block_multiple_of=8, conv_L_cache=3)
decoder("lfm2_moe", "Lfm2Moe", layer_types=CONVS, conv_L_cache=3, num_dense_layers=1, **EXPERTS)
decoder("minimax", "MiniMax", block_size=4, layer_types=LINEAR["layer_types"], **HEAD, **LOCAL)
HYBRID = {"count": 4, "num_hidden_layers": 4, "num_key_value_heads": 4, "mamba_expand": 2, **SSM}
HYBRID["layers_block_type"] = ["mamba", "hybrid"] * 2
decoder(
    "zamba",
    "Zamba",
    attention_hidden_size=64,
    attention_head_dim=16,
    mamba_dt_rank=4,
    n_mamba_heads=2,
    use_mamba_kernels=False,
    **HYBRID,
)
decoder(
    "zamba2",
    "Zamba2",
    hybrid_layer_ids=[1, 3],
    n_mamba_heads=8,
    mamba_headdim=8,
    mamba_ngroups=1,
    chunk_size=8,
    num_mem_blocks=1,
    adapter_rank=4,
    use_mem_rope=True,
    kv_channels=8,
    **HYBRID,
)
decoder(
    "nemotron_h",
    "NemotronH",
    layers_block_type=["mamba", "attention", "moe"],
    num_hidden_layers=...,
    mamba_num_heads=8,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=1,
    conv_kernel=2,
    chunk_size=8,
    moe_shared_expert_intermediate_size=32,
    **HEAD,
    **{k: v for k, v in ROUTED.items() if k != "n_shared_experts"},
)
