"""Text decoders new in transformers 5, and some less common older ones."""

from __future__ import annotations

from tests.families.catalogue_text import (
    DENSE_FIRST,
    EXPERTS,
    HEAD,
    LATENT,
    LINEAR,
    LOCAL,
    PER_LAYER,
    ROUTED,
    SHARED,
    SLIDES,
    decoder,
)
from tests.families.family import VOCAB, WIDTH

# ---- attention and dense feed-forwards
decoder("beam", "Beam", **HEAD)
decoder("cwm", "Cwm", **HEAD, **SLIDES)
decoder("flint", "Flint", **HEAD)
decoder("granite_swa", "GraniteSWA", **SLIDES)
decoder("hyperclovax", "HyperCLOVAX", **HEAD)
decoder("jais2", "Jais2", **HEAD)
decoder("lfm3", "Lfm3", **HEAD)
decoder("ministral3", "Ministral3", **HEAD)
decoder("youtu", "Youtu", **{k: v for k, v in LATENT.items() if k not in ROUTED})
decoder("minicpm3", "MiniCPM3", **{k: v for k, v in LATENT.items() if k not in ROUTED})
decoder(
    "xlstm",
    "xLSTM",
    at="backbone.blocks",
    hidden_size=64,
    num_heads=4,
    qk_dim_factor=1.0,
    chunk_size=16,
    autocast_kernel_dtype="float32",
)
decoder(
    "gemma4_unified_text",
    ("Gemma4UnifiedTextConfig", "Gemma4UnifiedForCausalLM"),
    global_head_dim=8,
    **HEAD,
    **PER_LAYER,
)
decoder("data2vec_text", "Data2VecText", at="data2vec_text.encoder.layer", is_decoder=True)
decoder(
    "roberta_prelayernorm",
    "RobertaPreLayerNorm",
    at="roberta_prelayernorm.encoder.layer",
    is_decoder=True,
)
decoder(
    "bert_generation",
    ("BertGenerationConfig", "BertGenerationDecoder"),
    at="bert.encoder.layer",
    is_decoder=True,
)
decoder("roc_bert", "RoCBert", at="roc_bert.encoder.layer", is_decoder=True)
decoder("moshi_text", "Moshi", **HEAD)

# ---- mixtures of experts
decoder("afmoe", "Afmoe", **EXPERTS, **HEAD, **SLIDES)
decoder("aria_text", ("AriaTextConfig", "AriaTextForCausalLM"), moe_num_experts=4, moe_topk=2)
decoder("cohere2_moe", "Cohere2Moe", **EXPERTS, **SLIDES)
decoder("exaone_moe", "ExaoneMoe", **EXPERTS, **HEAD, **SLIDES)
decoder("granitemoe_swa", "GraniteMoeSWA", **LOCAL, **SLIDES)
decoder("granitemoeshared", "GraniteMoeShared", shared_intermediate_size=32, **LOCAL)
decoder("hy_v3", "HYV3", **EXPERTS, **HEAD, **DENSE_FIRST)
decoder("hy_v4", "HYV4", layout="btsd", note="several streams, all edited", **EXPERTS, **HEAD)
decoder("inkling_text", ("InklingTextConfig", "InklingForCausalLM"), **HEAD, **ROUTED)
decoder("inkling2_text", ("Inkling2TextConfig", "Inkling2ForCausalLM"), **HEAD, **ROUTED)
decoder("kolibri1", "Kolibri1", **HEAD, **EXPERTS)
decoder("laguna", "Laguna", **HEAD, **EXPERTS, **SHARED)
decoder("mellum", "Mellum", **HEAD, **EXPERTS)
decoder("mimo_v2_flash", "MiMoV2Flash", **HEAD, **ROUTED)
decoder("minimax_m3_text", ("MiniMaxM3VLTextConfig", "MiniMaxM3VLForCausalLM"), **HEAD, **LOCAL)
decoder("solar_open", "SolarOpen", **HEAD, **ROUTED)
decoder("zaya", "Zaya", **HEAD, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=32)
SPARSE = {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 4}
decoder("axk1", "AXK1", **LATENT, **DENSE_FIRST)
decoder("axk2", "AXK2", **LATENT, **DENSE_FIRST)
decoder("deepseek_v32", "DeepseekV32", **LATENT, **DENSE_FIRST, **SPARSE)
decoder("glm4_moe_lite", "Glm4MoeLite", **LATENT, **DENSE_FIRST)
decoder("glm_moe_dsa", "GlmMoeDsa", **LATENT, **DENSE_FIRST, **SPARSE)
decoder("dots3_note_text", ("Dots3NoteTextConfig", "Dots3NoteForCausalLM"), **LATENT, **DENSE_FIRST)

# ---- mixtures of attention and other mixers
decoder("bailing_hybrid", "BailingHybrid", layer_group_size=3, **LATENT, **DENSE_FIRST)
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
INDEXER |= {"indexer_budget": 8, "indexer_compress_ratio": 2}
HC = {"hc_count": 2, "hc_lowrank": 8}
decoder(
    "qwen4_exp_text",
    ("Qwen4ExpTextConfig", "Qwen4ExpForCausalLM"),
    note="several streams side by side in one hidden state",
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
    **HEAD,
    **EXPERTS,
    **SHARED,
    **LINEAR,
    **INDEXER,
    **HC,
)
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
decoder(
    "cohere_compass_text",
    ("CohereCompassTextConfig", "CohereCompassForCausalLM"),
    rope_parameters={"full_attention": SECTIONS, "sliding_attention": SECTIONS},
    **SLIDES,
)
CPM = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4}
decoder(
    "cpmant",
    "CpmAnt",
    at="cpmant.encoder.layers",
    base=CPM,
    refused="cpmant",
    dim_head=8,
    dim_ff=64,
)
