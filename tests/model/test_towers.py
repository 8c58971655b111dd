"""Components of special families: modules, widths, streams and layouts, compared with a plain run."""

from __future__ import annotations

import pytest

from reft_kernels.model import ROLES, resolve
from tests.model.shape_recording import fits, record
from tests.model.towers import MODELS, batch, make

ALL = "all"
PLACES = [
    # family, component, layers, first path, side, width, backbone, stream, layout
    (
        "mixtral",
        "mlp_output",
        ALL,
        "model.layers.0.mlp|block_sparse_moe",
        32,
        "model",
        "tokens",
        "btd",
    ),
    ("qwen2_moe", "mlp_output", ALL, "model.layers.0.mlp", 32, "model", "tokens", "btd"),
    (
        "qwen2_moe",
        "mlp_activation",
        [0, 2],
        "model.layers.0.mlp.down_proj",
        64,
        "model",
        "tokens",
        "btd",
    ),
    ("deepseek_v3", "mlp_input", ALL, "model.layers.0.mlp", 32, "model", "tokens", "btd"),
    (
        "deepseek_v3",
        "mlp_activation",
        [0],
        "model.layers.0.mlp.down_proj",
        64,
        "model",
        "tokens",
        "btd",
    ),
    (
        "granitemoe",
        "mlp_output",
        ALL,
        "model.layers.0.block_sparse_moe",
        32,
        "model",
        "tokens",
        "btd",
    ),
    ("gpt_oss", "mlp_output", ALL, "model.layers.0.mlp", 32, "model", "tokens", "btd"),
    ("llama4", "mlp_output", ALL, "model.layers.0.feed_forward", 32, "model", "tokens", "btd"),
    ("switch", "mlp_output", ALL, "encoder.block.0.layer.1", 32, "encoder", "tokens", "btd"),
    ("switch", "decoder.mlp_input", ALL, "decoder.block.0.layer.2", 32, "decoder", "tokens", "btd"),
    ("longcat_flash", "block_output", ALL, "model.layers.0", 32, "model", "tokens", "btd"),
    (
        "qwen3_next",
        "attention_output",
        [1],
        "model.layers.1.self_attn",
        32,
        "model",
        "tokens",
        "btd",
    ),
    (
        "qwen3_next",
        "mixer_output",
        [0, 2],
        "model.layers.0.linear_attn",
        32,
        "model",
        "tokens",
        "btd",
    ),
    ("lfm2", "mixer_input", [0, 2], "model.layers.0.conv", 32, "model", "tokens", "btd"),
    ("lfm2", "mlp_activation", ALL, "model.layers.0.feed_forward.w2", 48, "model", "tokens", "btd"),
    (
        "recurrent_gemma",
        "attention_input",
        [1],
        "model.layers.1.temporal_block",
        32,
        "model",
        "tokens",
        "btd",
    ),
    (
        "recurrent_gemma",
        "mixer_output",
        [0],
        "model.layers.0.temporal_block",
        32,
        "model",
        "tokens",
        "btd",
    ),
    ("minimax", "attention_output", [1], "model.layers.1.self_attn", 32, "model", "tokens", "btd"),
    ("minimax", "mixer_output", [0, 2], "model.layers.0.self_attn", 32, "model", "tokens", "btd"),
    (
        "kimi_linear",
        "attention_output",
        [1],
        "model.layers.1.self_attn",
        32,
        "model",
        "tokens",
        "btd",
    ),
    (
        "kimi_linear",
        "mixer_output",
        [0, 2],
        "model.layers.0.self_attn",
        32,
        "model",
        "tokens",
        "btd",
    ),
    ("zamba", "mixer_output", ALL, "model.layers.0.mamba", 32, "model", "tokens", "btd"),
    ("mamba", "mixer_output", ALL, "backbone.layers.0.mixer", 32, "backbone", "tokens", "btd"),
    ("rwkv", "mixer_output", ALL, "rwkv.blocks.0.attention", 32, "rwkv", "tokens", "btd"),
    (
        "opt",
        "mlp_activation",
        ALL,
        "model.decoder.layers.0.fc2",
        64,
        "model.decoder",
        "tokens",
        "btd",
    ),
    ("bart", "mlp_output", ALL, "model.encoder.layers.0.fc2", 32, "model.encoder", "tokens", "btd"),
    (
        "bart",
        "decoder.attention_output",
        ALL,
        "model.decoder.layers.0.self_attn",
        32,
        "model.decoder",
        "tokens",
        "btd",
    ),
    (
        "bart",
        "model.decoder.layers.{layer}.encoder_attn.q_proj",
        ALL,
        "model.decoder.layers.0.encoder_attn.q_proj",
        32,
        "model.decoder",
        "tokens",
        "btd",
    ),
    (
        "pegasus_x",
        "block_output",
        ALL,
        "model.encoder.layers.0",
        32,
        "model.encoder",
        "tokens",
        "btd_padded",
    ),
    (
        "pegasus_x",
        "decoder.mlp_output",
        ALL,
        "model.decoder.layers.0.fc2",
        32,
        "model.decoder",
        "tokens",
        "btd",
    ),
    (
        "led",
        "mlp_activation",
        ALL,
        "led.encoder.layers.0.fc2",
        64,
        "led.encoder",
        "tokens",
        "btd_padded",
    ),
    (
        "led",
        "decoder.block_output",
        ALL,
        "led.decoder.layers.0",
        32,
        "led.decoder",
        "tokens",
        "btd",
    ),
    (
        "prophetnet",
        "block_output",
        ALL,
        "prophetnet.encoder.layers.0",
        32,
        "prophetnet.encoder",
        "tokens",
        "btd",
    ),
    (
        "albert",
        "mlp_output",
        ALL,
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output",
        32,
        "albert",
        "tokens",
        "btd",
    ),
    (
        "mobilebert",
        "attention_output",
        ALL,
        "mobilebert.encoder.layer.0.attention",
        16,
        "mobilebert",
        "tokens",
        "btd",
    ),
    (
        "mobilebert",
        "block_output",
        ALL,
        "mobilebert.encoder.layer.0",
        32,
        "mobilebert",
        "tokens",
        "btd",
    ),
    (
        "longformer",
        "block_output",
        ALL,
        "longformer.encoder.layer.0",
        32,
        "longformer",
        "tokens",
        "btd_padded",
    ),
    ("longformer", "lm_head.dense", ALL, "lm_head.dense", 32, "", "tokens", "btd"),
    (
        "xlnet",
        "mlp_activation",
        ALL,
        "transformer.layer.0.ff.layer_2",
        64,
        "transformer",
        "tokens",
        "tbd",
    ),
    ("xlnet", "lm_loss.input", ALL, "lm_loss", 32, "", "tokens", "btd"),
    ("deepseek_v4", "block_output", ALL, "model.layers.0", 32, "model", "tokens", "btsd"),
    (
        "deepseek_v4",
        "attention_output",
        ALL,
        "model.layers.0.self_attn",
        32,
        "model",
        "tokens",
        "btd",
    ),
    ("gemma3n", "block_input", ALL, "model.layers.0", 32, "model", "tokens", "sbtd"),
    ("gemma3n", "mlp_output", ALL, "model.layers.0.mlp", 32, "model", "tokens", "btd"),
    ("wav2vec2", "mlp_output", ALL, "encoder.layers.0.feed_forward", 32, "", "own", "btd"),
    ("whisper", "block_output", ALL, "model.encoder.layers.0", 32, "model.encoder", "own", "btd"),
    (
        "whisper",
        "decoder.block_output",
        ALL,
        "model.decoder.layers.0",
        32,
        "model.decoder",
        "tokens",
        "btd",
    ),
    ("bert2bert", "block_output", ALL, "encoder.encoder.layer.0", 32, "encoder", "tokens", "btd"),
    (
        "bert2bert",
        "encoder.block_output",
        ALL,
        "encoder.encoder.layer.0",
        32,
        "encoder",
        "tokens",
        "btd",
    ),
    (
        "bert2bert",
        "decoder.block_output",
        ALL,
        "decoder.bert.encoder.layer.0",
        32,
        "decoder.bert",
        "tokens",
        "btd",
    ),
    (
        "trocr",
        "block_output",
        ALL,
        "encoder.layers.0|encoder.encoder.layer.0",
        24,
        "encoder",
        "own",
        "btd",
    ),
    (
        "trocr",
        "decoder.block_output",
        ALL,
        "decoder.model.decoder.layers.0",
        32,
        "decoder.model.decoder",
        "tokens",
        "btd",
    ),
    ("clip", "block_output", ALL, "text_model.encoder.layers.0", 32, "text_model", "tokens", "btd"),
    (
        "clip",
        "vision_model.encoder.layers.{layer}",
        ALL,
        "vision_model.encoder.layers.0",
        24,
        "vision_model",
        "own",
        "btd",
    ),
    (
        "clip",
        "vision_model.encoder.layers.{layer}.mlp",
        [1],
        "vision_model.encoder.layers.1.mlp",
        24,
        "vision_model",
        "own",
        "btd",
    ),
    (
        "clip_images",
        "block_output",
        ALL,
        "vision_model.encoder.layers.0",
        24,
        "vision_model",
        "own",
        "btd",
    ),
    (
        "llava",
        "block_output",
        ALL,
        "model.language_model.layers.0",
        32,
        "model.language_model",
        "tokens",
        "btd",
    ),
    (
        "llava",
        "model.multi_modal_projector",
        ALL,
        "model.multi_modal_projector",
        32,
        "model",
        "own",
        "btd",
    ),
    (
        "llava",
        "model.multi_modal_projector.linear_1.input",
        ALL,
        "model.multi_modal_projector.linear_1",
        24,
        "model",
        "own",
        "btd",
    ),
    (
        "blip2_opt",
        "block_output",
        ALL,
        "language_model.model.decoder.layers.0",
        32,
        "language_model.model.decoder",
        "tokens",
        "btd",
    ),
    (
        "blip2_opt",
        "qformer.encoder.layer.{layer}",
        ALL,
        "qformer.encoder.layer.0",
        32,
        "",
        "own",
        "btd",
    ),
    (
        "blip2_t5",
        "block_output",
        ALL,
        "language_model.encoder.block.0",
        32,
        "language_model.encoder",
        "tokens",
        "btd",
    ),
    (
        "blip2_t5",
        "decoder.block_output",
        ALL,
        "language_model.decoder.block.0",
        32,
        "language_model.decoder",
        "tokens",
        "btd",
    ),
]


@pytest.mark.parametrize(
    ("family", "name", "layers", "path", "width", "backbone", "stream", "layout"), PLACES
)
def test_places(family, name, layers, path, width, backbone, stream, layout):
    model = make(family)
    component = resolve(model, name, layers)
    targets = component.targets
    first, _, other = path.partition("|")
    # the name depends on the version of transformers
    choices = (first, other, f"{first.rsplit('.', 1)[0]}.{other}")
    assert targets[0].path in choices and component.backbone == backbone
    assert {(t.embed_dim, t.stream, t.layout) for t in targets} == {(width, stream, layout)}
    shapes, calls = record(model, component, batch(family))
    assert calls and all(shapes), "the backbone or a place did not run"
    for seen in shapes:
        assert all(shape[-1] == width for shape in seen)
        if stream == "tokens":
            assert all(fits(shape, layout, calls[0]) for shape in seen)


@pytest.mark.parametrize("family", ["bart", "blip2_t5", "bert2bert", "trocr", "whisper"])
def test_sides(family):
    model = make(family)
    for side in ("encoder", "decoder"):
        component = resolve(model, f"{side}.block_output")
        assert (component.encoder, component.decoder) == (side == "encoder", side == "decoder")
    assert resolve(model, "block_output").encoder


def test_stages_of_growing_width():
    model = make("swin")
    component = resolve(model, "block_output")
    shapes, _ = record(model, component, batch("swin"))
    assert (
        [t.embed_dim for t in component.targets]
        == [shape[0][-1] for shape in shapes]
        == [32, 64, 64]
    )
    entered = resolve(model, "block_input")
    shapes, _ = record(model, entered, batch("swin"))
    assert (
        [t.embed_dim for t in entered.targets] == [shape[0][-1] for shape in shapes] == [16, 32, 64]
    )


def test_what_the_attention_of_zamba_reads_is_wider_than_the_stream():
    model = make("zamba")
    component = resolve(model, "attention_input", [1])
    shapes, _ = record(model, component, batch("zamba"))
    assert component.targets[0].embed_dim == shapes[0][0][-1] == 64


@pytest.mark.parametrize("family", ["xlm"])
def test_modules_of_a_family_without_blocks_are_named_by_path(family):
    model = make(family)
    for path in ("attentions.{layer}", "ffns.{layer}"):
        component = resolve(model, path)
        shapes, calls = record(model, component, batch(family))
        assert len(component.targets) == 3 and all(fits(s[0], "btd", calls[0]) for s in shapes)


def test_attention_and_mixers_never_share_a_module():
    for family in (
        "qwen3_next",
        "lfm2",
        "recurrent_gemma",
        "minimax",
        "kimi_linear",
        "zamba",
        "mamba",
        "rwkv",
        "bart",
        "switch",
    ):
        if family not in MODELS:
            continue
        try:
            model = make(family)
        except pytest.skip.Exception:
            continue
        by_role: dict[str, set[str]] = {role: set() for role in ROLES}
        for role, role_paths in by_role.items():
            for layer in range(2):
                try:
                    role_paths.update(t.path for t in resolve(model, role, [layer]).targets)
                except ValueError as error:
                    assert str(error).startswith(("component:", "layers:"))
        assert not by_role["attention_output"] & by_role["mixer_output"]
        paths = by_role["attention_output"]
        assert not any("encoder_attn" in path or "linear_attn" in path for path in paths)
