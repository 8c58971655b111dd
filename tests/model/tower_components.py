"""Expected modules, widths and layouts of components in special families."""

from __future__ import annotations

from typing import NamedTuple

ALL = "all"


class Expected(NamedTuple):
    """A component of a family and what it resolves to.

    Attributes:
        family: Name of the model in ``tests.model.towers``.
        component: Role or module path.
        layers: Layers, or "all".
        path: Path of the first module; "|" separates names of different versions.
        width: Width of the hidden states.
        backbone: Path of the backbone.
        stream: "tokens" or another stream.
        layout: Order of the dimensions.
    """

    family: str
    component: str
    layers: str | list[int]
    path: str
    width: int = 32
    backbone: str = "model"
    stream: str = "tokens"
    layout: str = "btd"


COMPONENTS = [
    Expected("mixtral", "mlp_output", ALL, "model.layers.0.mlp|block_sparse_moe"),
    Expected("qwen2_moe", "mlp_output", ALL, "model.layers.0.mlp"),
    Expected("qwen2_moe", "mlp_activation", [0, 2], "model.layers.0.mlp.down_proj", width=64),
    Expected("deepseek_v3", "mlp_input", ALL, "model.layers.0.mlp"),
    Expected("deepseek_v3", "mlp_activation", [0], "model.layers.0.mlp.down_proj", width=64),
    Expected("granitemoe", "mlp_output", ALL, "model.layers.0.block_sparse_moe"),
    Expected("gpt_oss", "mlp_output", ALL, "model.layers.0.mlp"),
    Expected("llama4", "mlp_output", ALL, "model.layers.0.feed_forward"),
    Expected("switch", "mlp_output", ALL, "encoder.block.0.layer.1", backbone="encoder"),
    Expected("switch", "decoder.mlp_input", ALL, "decoder.block.0.layer.2", backbone="decoder"),
    Expected("longcat_flash", "block_output", ALL, "model.layers.0"),
    Expected("qwen3_next", "attention_output", [1], "model.layers.1.self_attn"),
    Expected("qwen3_next", "mixer_output", [0, 2], "model.layers.0.linear_attn"),
    Expected("lfm2", "mixer_input", [0, 2], "model.layers.0.conv"),
    Expected("lfm2", "mlp_activation", ALL, "model.layers.0.feed_forward.w2", width=48),
    Expected("recurrent_gemma", "attention_input", [1], "model.layers.1.temporal_block"),
    Expected("recurrent_gemma", "mixer_output", [0], "model.layers.0.temporal_block"),
    Expected("minimax", "attention_output", [1], "model.layers.1.self_attn"),
    Expected("minimax", "mixer_output", [0, 2], "model.layers.0.self_attn"),
    Expected("kimi_linear", "attention_output", [1], "model.layers.1.self_attn"),
    Expected("kimi_linear", "mixer_output", [0, 2], "model.layers.0.self_attn"),
    Expected("zamba", "mixer_output", ALL, "model.layers.0.mamba"),
    Expected("mamba", "mixer_output", ALL, "backbone.layers.0.mixer", backbone="backbone"),
    Expected("rwkv", "mixer_output", ALL, "rwkv.blocks.0.attention", backbone="rwkv"),
    Expected(
        "opt",
        "mlp_activation",
        ALL,
        "model.decoder.layers.0.fc2",
        width=64,
        backbone="model.decoder",
    ),
    Expected("bart", "mlp_output", ALL, "model.encoder.layers.0.fc2", backbone="model.encoder"),
    Expected(
        "bart",
        "decoder.attention_output",
        ALL,
        "model.decoder.layers.0.self_attn",
        backbone="model.decoder",
    ),
    Expected(
        "bart",
        "model.decoder.layers.{layer}.encoder_attn.q_proj",
        ALL,
        "model.decoder.layers.0.encoder_attn.q_proj",
        backbone="model.decoder",
    ),
    Expected(
        "pegasus_x",
        "block_output",
        ALL,
        "model.encoder.layers.0",
        backbone="model.encoder",
        layout="btd_padded",
    ),
    Expected(
        "pegasus_x",
        "decoder.mlp_output",
        ALL,
        "model.decoder.layers.0.fc2",
        backbone="model.decoder",
    ),
    Expected(
        "led",
        "mlp_activation",
        ALL,
        "led.encoder.layers.0.fc2",
        width=64,
        backbone="led.encoder",
        layout="btd_padded",
    ),
    Expected("led", "decoder.block_output", ALL, "led.decoder.layers.0", backbone="led.decoder"),
    Expected(
        "prophetnet",
        "block_output",
        ALL,
        "prophetnet.encoder.layers.0",
        backbone="prophetnet.encoder",
    ),
    Expected(
        "albert",
        "mlp_output",
        ALL,
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output",
        backbone="albert",
    ),
    Expected(
        "mobilebert",
        "attention_output",
        ALL,
        "mobilebert.encoder.layer.0.attention",
        width=16,
        backbone="mobilebert",
    ),
    Expected(
        "mobilebert", "block_output", ALL, "mobilebert.encoder.layer.0", backbone="mobilebert"
    ),
    Expected(
        "longformer",
        "block_output",
        ALL,
        "longformer.encoder.layer.0",
        backbone="longformer",
        layout="btd_padded",
    ),
    Expected("longformer", "lm_head.dense", ALL, "lm_head.dense", backbone=""),
    Expected(
        "xlnet",
        "mlp_activation",
        ALL,
        "transformer.layer.0.ff.layer_2",
        width=64,
        backbone="transformer",
        layout="tbd",
    ),
    Expected("xlnet", "lm_loss.input", ALL, "lm_loss", backbone=""),
    Expected("deepseek_v4", "block_output", ALL, "model.layers.0", layout="btsd"),
    Expected("deepseek_v4", "attention_output", ALL, "model.layers.0.self_attn"),
    Expected("gemma3n", "block_input", ALL, "model.layers.0", layout="sbtd"),
    Expected("gemma3n", "mlp_output", ALL, "model.layers.0.mlp"),
    Expected(
        "wav2vec2", "mlp_output", ALL, "encoder.layers.0.feed_forward", backbone="", stream="own"
    ),
    Expected(
        "whisper",
        "block_output",
        ALL,
        "model.encoder.layers.0",
        backbone="model.encoder",
        stream="own",
    ),
    Expected(
        "whisper", "decoder.block_output", ALL, "model.decoder.layers.0", backbone="model.decoder"
    ),
    Expected("bert2bert", "block_output", ALL, "encoder.encoder.layer.0", backbone="encoder"),
    Expected(
        "bert2bert", "encoder.block_output", ALL, "encoder.encoder.layer.0", backbone="encoder"
    ),
    Expected(
        "bert2bert",
        "decoder.block_output",
        ALL,
        "decoder.bert.encoder.layer.0",
        backbone="decoder.bert",
    ),
    Expected(
        "trocr",
        "block_output",
        ALL,
        "encoder.layers.0|encoder.encoder.layer.0",
        width=24,
        backbone="encoder",
        stream="own",
    ),
    Expected(
        "trocr",
        "decoder.block_output",
        ALL,
        "decoder.model.decoder.layers.0",
        backbone="decoder.model.decoder",
    ),
    Expected("clip", "block_output", ALL, "text_model.encoder.layers.0", backbone="text_model"),
    Expected(
        "clip",
        "vision_model.encoder.layers.{layer}",
        ALL,
        "vision_model.encoder.layers.0",
        width=24,
        backbone="vision_model",
        stream="own",
    ),
    Expected(
        "clip",
        "vision_model.encoder.layers.{layer}.mlp",
        [1],
        "vision_model.encoder.layers.1.mlp",
        width=24,
        backbone="vision_model",
        stream="own",
    ),
    Expected(
        "clip_images",
        "block_output",
        ALL,
        "vision_model.encoder.layers.0",
        width=24,
        backbone="vision_model",
        stream="own",
    ),
    Expected(
        "llava",
        "block_output",
        ALL,
        "model.language_model.layers.0",
        backbone="model.language_model",
    ),
    Expected(
        "llava", "model.multi_modal_projector", ALL, "model.multi_modal_projector", stream="own"
    ),
    Expected(
        "llava",
        "model.multi_modal_projector.linear_1.input",
        ALL,
        "model.multi_modal_projector.linear_1",
        width=24,
        stream="own",
    ),
    Expected(
        "blip2_opt",
        "block_output",
        ALL,
        "language_model.model.decoder.layers.0",
        backbone="language_model.model.decoder",
    ),
    Expected(
        "blip2_opt",
        "qformer.encoder.layer.{layer}",
        ALL,
        "qformer.encoder.layer.0",
        backbone="",
        stream="own",
    ),
    Expected(
        "blip2_t5",
        "block_output",
        ALL,
        "language_model.encoder.block.0",
        backbone="language_model.encoder",
    ),
    Expected(
        "blip2_t5",
        "decoder.block_output",
        ALL,
        "language_model.decoder.block.0",
        backbone="language_model.decoder",
    ),
]
