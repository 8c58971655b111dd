"""Text encoders and text encoder-decoder models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.families.family import (
    BART,
    DECODER,
    ENCODER,
    SPECIAL,
    VERSION_5,
    VOCAB,
    WIDTH,
    Batch,
    Family,
    add,
    decoder_tokens,
    generator,
    maker,
    paths,
    split,
    text,
    text_tokens,
    transformers_class,
    with_decoder_ids,
)

HEADS = ("ForSequenceClassification", "ForMaskedLM", "Model")


def encoder(name: str, model: str, at: str | tuple[str, ...], **keywords: Any) -> None:
    """Add an encoder; the configuration's name is the model's without its head."""
    family, settings = split(keywords)
    config = family.pop("config", None)
    if config is None:
        config = next(model.removesuffix(h) for h in HEADS if model.endswith(h)) + "Config"
    make = maker(model, config, {**family.pop("base", ENCODER), **settings})
    scores = model.endswith(("ForMaskedLM", "Model"))
    common = {
        "kind": "encoder",
        "inputs": text,
        "count": 3,
        "tokens": text_tokens,
        "scores_tokens": scores,
    }
    add(Family(name=name, make=make, blocks=paths(at), **{**common, **family}))


encoder("bert", "BertForSequenceClassification", "bert.encoder.layer")
encoder("bert_mlm", "BertForMaskedLM", "bert.encoder.layer")
encoder("roberta", "RobertaForSequenceClassification", "roberta.encoder.layer")
encoder("xlm_roberta", "XLMRobertaForMaskedLM", "roberta.encoder.layer")
encoder("xlm_roberta_xl", "XLMRobertaXLForSequenceClassification", "roberta.encoder.layer")
encoder(
    "xmod",
    "XmodForSequenceClassification",
    "roberta.encoder.layer",
    languages=["en_XX"],
    default_language="en_XX",
)
encoder("camembert", "CamembertForSequenceClassification", "roberta.encoder.layer")
RELATIVE = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 16,
}
encoder("deberta", "DebertaForSequenceClassification", "deberta.encoder.layer", **RELATIVE)
encoder(
    "deberta_v2",
    "DebertaV2ForSequenceClassification",
    "deberta.encoder.layer",
    position_buckets=8,
    share_att_key=True,
    norm_rel_ebd="layer_norm",
    **RELATIVE,
)
encoder(
    "deberta_v2_conv",
    "DebertaV2ForMaskedLM",
    "deberta.encoder.layer",
    conv_kernel_size=3,
    conv_act="gelu",
    **RELATIVE,
)
DISTIL = {"vocab_size": VOCAB, "dim": WIDTH, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}
encoder(
    "distilbert",
    "DistilBertForSequenceClassification",
    "distilbert.transformer.layer",
    base=DISTIL,
    max_position_embeddings=128,
    pad_token_id=0,
    initializer_range=0.15,
)
encoder(
    "albert",
    "AlbertForSequenceClassification",
    "albert.encoder.albert_layer_groups",
    count=1,
    embedding_size=16,
    num_hidden_groups=1,
    inner_group_num=1,
    note="one group of layers runs three times",
)
encoder("electra", "ElectraForSequenceClassification", "electra.encoder.layer", embedding_size=16)
MODERN = {"local_attention": 8, "global_attn_every_n_layers": 2}
MODERN |= {"cls_token_id": 1, "sep_token_id": 2}
encoder(
    "modernbert",
    "ModernBertForSequenceClassification",
    "model.layers",
    classifier_pooling="mean",
    **MODERN,
)
encoder("modernbert_mlm", "ModernBertForMaskedLM", "model.layers", **MODERN)
encoder("mpnet", "MPNetForSequenceClassification", "mpnet.encoder.layer")
encoder("nomic_bert", "NomicBertForMaskedLM", "nomic_bert.layers")
encoder("eurobert", "EuroBertForMaskedLM", "model.layers", num_key_value_heads=4)
encoder("jina_v3", "JinaEmbeddingsV3ForMaskedLM", "roberta.layers")
encoder(
    "longformer",
    "LongformerForMaskedLM",
    "longformer.encoder.layer",
    attention_window=8,
    pads=True,
    note="pads to its attention window",
)
encoder("big_bird", "BigBirdForMaskedLM", "bert.encoder.layer", attention_type="original_full")
encoder(
    "convbert",
    "ConvBertForSequenceClassification",
    "convbert.encoder.layer",
    embedding_size=32,
    conv_kernel_size=3,
    head_ratio=2,
)
encoder(
    "rembert",
    "RemBertForSequenceClassification",
    "rembert.encoder.layer",
    input_embedding_size=16,
    output_embedding_size=16,
)
encoder(
    "roformer", "RoFormerForSequenceClassification", "roformer.encoder.layer", embedding_size=32
)
encoder(
    "nystromformer",
    "NystromformerForSequenceClassification",
    "nystromformer.encoder.layer",
    segment_means_seq_len=12,
    num_landmarks=12,
)


def unmasked(padding: str, batch: int) -> Batch | None:
    """A batch without a mask, for FNet, which mixes all tokens."""
    return text("none", batch) if padding == "none" else None


encoder(
    "fnet",
    "FNetForSequenceClassification",
    "fnet.encoder.layer",
    inputs=unmasked,
    tpu_short_seq_length=12,
)
encoder("ibert", "IBertForSequenceClassification", "ibert.encoder.layer")
encoder("layoutlm", "LayoutLMForSequenceClassification", "layoutlm.encoder.layer")
encoder(
    "esm",
    "EsmForSequenceClassification",
    "esm.encoder.layer",
    position_embedding_type="rotary",
    mask_token_id=3,
)
encoder("ernie", "ErnieForSequenceClassification", "ernie.encoder.layer")
encoder("megatron_bert", "MegatronBertForSequenceClassification", "bert.encoder.layer")
NARROW = {"embedding_size": 32, "intra_bottleneck_size": 16, "true_hidden_size": 16}
MOBILE = "MobileBertForSequenceClassification"
encoder("mobilebert", MOBILE, "mobilebert.encoder.layer", **NARROW)
encoder(
    "mobilebert_mlp",
    MOBILE,
    "mobilebert.encoder.layer",
    component="mlp_output",
    refused="mlp",
    **NARROW,
)
GROUPS = ("q_groups", "k_groups", "v_groups", "post_attention_groups")
encoder(
    "squeezebert",
    "SqueezeBertForSequenceClassification",
    "transformer.encoder.layers",
    refused="squeezebert",
    embedding_size=32,
    **dict.fromkeys((*GROUPS, "intermediate_groups", "output_groups"), 1),
)
encoder(
    "funnel",
    "FunnelForSequenceClassification",
    "funnel.encoder.blocks",
    refused="funnel",
    base={"vocab_size": VOCAB, "d_model": WIDTH, "n_head": 4, "d_head": 8, "d_inner": 64},
    block_sizes=[1, 1, 1],
    pad_token_id=0,
)
encoder(
    "xlm",
    "XLMForSequenceClassification",
    "transformer.ffns",
    refused="xlm",
    base={"vocab_size": VOCAB, "emb_dim": WIDTH, "n_layers": 3, "n_heads": 4, "n_words": VOCAB},
    max_position_embeddings=128,
    pad_index=0,
    bos_index=1,
    eos_index=2,
)


# ---- encoder-decoders


def pair(name: str, model: str | Any, at: str, dec: str = "", **keywords: Any) -> None:
    """Add the encoder of an encoder-decoder model and, if its path is passed, the decoder."""
    family, settings = split(keywords)
    base, config = family.pop("base", BART), family.pop("config", "")
    start = {**base, **settings}.get("decoder_start_token_id", 2)
    if isinstance(model, str):
        bare = model.removesuffix("ForConditionalGeneration").removesuffix("MTModel")
        make = maker(model, config or f"{bare}Config", {**base, **settings})
    else:
        make = model
    common = {
        "kind": "encoder-decoder",
        "make": make,
        "inputs": lambda padding, batch: with_decoder_ids(text(padding, batch), start),
        "count": 2,
        **family,
    }
    add(Family(name=name, blocks=paths(at), tokens=text_tokens, generates=True, **common))
    if dec:
        side = {"tokens": decoder_tokens, "component": "decoder.block_output", "labels": "decoder"}
        add(Family(name=f"{name}_decoder", blocks=paths(dec), **{**common, **side}))


T5 = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "relative_attention_num_buckets": 8,
}
GATED = {"base": {**T5, "feed_forward_proj": "gated-gelu"}}
pair("t5", "T5ForConditionalGeneration", "encoder.block", "decoder.block", base=T5)
pair("mt5", "MT5ForConditionalGeneration", "encoder.block", "decoder.block", **GATED)
pair("umt5", "UMT5ForConditionalGeneration", "encoder.block", "decoder.block", **GATED)
pair(
    "longt5",
    "LongT5ForConditionalGeneration",
    "encoder.block",
    base=T5,
    local_radius=4,
    encoder_attention_type="local",
)
pair(
    "switch_transformers",
    "SwitchTransformersForConditionalGeneration",
    "encoder.block",
    base=T5,
    num_experts=4,
    expert_capacity=64,
    num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1,
    router_jitter_noise=0.0,
)
SIDES = ("model.encoder.layers", "model.decoder.layers")
pair("bart", "BartForConditionalGeneration", *SIDES)
pair("mbart", "MBartForConditionalGeneration", *SIDES)
pair("pegasus", "PegasusForConditionalGeneration", *SIDES)
pair("marian", "MarianMTModel", *SIDES, decoder_vocab_size=VOCAB)
pair("blenderbot", "BlenderbotForConditionalGeneration", SIDES[0])
pair("m2m_100", "M2M100ForConditionalGeneration", SIDES[0])
pair("plbart", "PLBartForConditionalGeneration", SIDES[0])
pair(
    "led",
    "LEDForConditionalGeneration",
    "led.encoder.layers",
    max_encoder_position_embeddings=64,
    max_decoder_position_embeddings=64,
    attention_window=4,
    pads=True,
    note="pads to its attention window",
)
pair(
    "pegasus_x",
    "PegasusXForConditionalGeneration",
    SIDES[0],
    num_global_tokens=4,
    block_size=4,
    stagger_local_blocks=True,
    pads=True,
    note="pads to its blocks; global tokens beside them",
)
pair(
    "bigbird_pegasus",
    "BigBirdPegasusForConditionalGeneration",
    SIDES[0],
    attention_type="block_sparse",
    block_size=4,
    num_random_blocks=1,
    pads=True,
)
PROPHET = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "init_std": 0.15,
    **SPECIAL,
}
pair("prophetnet", "ProphetNetForConditionalGeneration", "prophetnet.encoder.layers", base=PROPHET)
pair(
    "nllb_moe",
    "NllbMoeForConditionalGeneration",
    SIDES[0],
    num_experts=4,
    expert_capacity=100,
    encoder_sparse_step=2,
    decoder_sparse_step=2,
)


def _t5gemma() -> nn.Module:
    side = {
        **DECODER,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    dec = {**side, "cross_attention_hidden_size": WIDTH, "is_decoder": True}
    config = transformers_class("T5GemmaConfig")(
        encoder=side, decoder=dec, vocab_size=VOCAB, **SPECIAL
    )
    return transformers_class("T5GemmaForConditionalGeneration")(config)


def _bert2bert() -> nn.Module:
    side = {**ENCODER, "num_hidden_layers": 2}
    make = transformers_class("BertConfig")
    enc, dec = make(**side), make(**side, is_decoder=True, add_cross_attention=True)
    config = transformers_class("EncoderDecoderConfig").from_encoder_decoder_configs(enc, dec)
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    model = transformers_class("EncoderDecoderModel")(config)
    model.generation_config.decoder_start_token_id = 2
    return model


pair("t5gemma", _t5gemma, *SIDES)
pair("bert2bert", _bert2bert, "encoder.encoder.layer", "decoder.bert.encoder.layer")

# ---- less common encoders, and those new in transformers 5
for _name, _bare, _at in (
    ("data2vec_text_mlm", "Data2VecText", "data2vec_text.encoder.layer"),
    ("roberta_prelayernorm_mlm", "RobertaPreLayerNorm", "roberta_prelayernorm.encoder.layer"),
    ("roc_bert_mlm", "RoCBert", "roc_bert.encoder.layer"),
    ("mra", "Mra", "mra.encoder.layer"),
    ("yoso", "Yoso", "yoso.encoder.layer"),
    ("tapas", "Tapas", "tapas.encoder.layer"),
    ("gte", "Gte", "gte.layers"),
    ("ultrabert", "Ultrabert", "model.layers"),
    ("esmc", "Esmc", "esmc.layers"),
):
    encoder(_name, f"{_bare}ForMaskedLM", _at)
encoder("luke", "LukeForMaskedLM", "luke.encoder.layer", entity_vocab_size=9, entity_emb_size=8)
encoder("splinter", "SplinterModel", "encoder.layer")
encoder(
    "openai_privacy_filter",
    "OpenAIPrivacyFilterModel",
    "layers",
    num_local_experts=4,
    num_experts_per_tok=2,
    head_dim=8,
)
encoder("embedding_gemma2_text", "EmbeddingGemma2TextModel", "layers", head_dim=8)


def _boxed(padding: str, batch: int) -> Batch | None:
    """Tokens with their bounding boxes on a page."""
    tensors = text(padding, batch)
    if tensors is not None:
        tensors["bbox"] = torch.randint(
            0, 40, (*tensors["input_ids"].shape, 4), generator=generator()
        )
        tensors["bbox"] = tensors["bbox"].sort(-1).values
    return tensors


def _corners(padding: str, batch: int) -> Batch | None:
    """Bounding boxes as four corners with coordinates between 0 and 1."""
    tensors = _boxed(padding, batch)
    if tensors is not None:
        tensors["bbox"] = torch.cat([tensors["bbox"]] * 2, -1).float() / 40
    return tensors


BOXED = {"inputs": _boxed, "max_2d_position_embeddings": 64}
encoder(
    "lilt",
    "LiltForSequenceClassification",
    "lilt.encoder.layer",
    hidden_size=48,
    refused="" if VERSION_5 else "lilt",
    **BOXED,
)
encoder("bros", "BrosModel", "encoder.layer", hidden_size=64, **{**BOXED, "inputs": _corners})
encoder("neomme", "NeoMMEForMaskedLM", "model.layers", head_dim=16, embedding_rank=8)
encoder("clip_text", "CLIPTextModel", ("encoder.layers", "text_model.encoder.layers"))
encoder(
    "dpr", "DPRQuestionEncoder", "question_encoder.bert_model.encoder.layer", config="DPRConfig"
)
encoder(
    "flaubert",
    "FlaubertWithLMHeadModel",
    "transformer.ffns",
    refused="flaubert",
    base={"vocab_size": VOCAB, "emb_dim": WIDTH, "n_layers": 3, "n_heads": 4, "n_words": VOCAB},
    config="FlaubertConfig",
    pad_index=0,
    bos_index=1,
    eos_index=2,
)
encoder("canine", "CanineForSequenceClassification", "canine.encoder.layer", refused="canine")
encoder(
    "markuplm",
    "MarkupLMForSequenceClassification",
    "markuplm.encoder.layer",
    max_depth=4,
    xpath_unit_hidden_size=8,
)
