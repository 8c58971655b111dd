"""Components that cannot be edited are refused with the reason when they are resolved."""

from __future__ import annotations

import pytest
from torch import nn

from reft_kernels.model import resolve
from tests.model.towers import make

ALL = "all"
UNSUPPORTED_FAMILIES = [
    (
        "mixtral",
        "mlp_activation",
        ALL,
        r"component: got 'mlp_activation'.*mixture of experts.*mlp_output",
    ),
    (
        "qwen2_moe",
        "mlp_activation",
        ALL,
        r"layers: got 'all'.*not in layers \[1\].*mixture.*layers=\[0, 2\]",
    ),
    ("granitemoe", "model.layers.{layer}.block_sparse_moe.router", ALL, "routing scores"),
    (
        "switch",
        "encoder.block.{layer}.layer.1.mlp.experts.expert_0",
        [1],
        "an expert sees the tokens",
    ),
    ("longcat_flash", "mlp_output", ALL, r"more than one feed-forward.*'mlps.0'"),
    ("longcat_flash", "attention_output", ALL, r"more than one self-attention.*'self_attn.0'"),
    (
        "qwen3_next",
        "attention_output",
        ALL,
        r"layers: got 'all'.*not in layers \[0, 2\].*layers=\[1\]",
    ),
    (
        "qwen3_next",
        "attention_output",
        [0, 1],
        r"layers: got \[0, 1\].*not in layers \[0\].*layers=\[1\]",
    ),
    (
        "qwen3_next",
        "attention_output",
        [3],
        r"layers: got \[3\], expected layer numbers from 0 to 2",
    ),
    (
        "qwen3_next",
        "model.layers.{layer}.self_attn",
        ALL,
        r"layers: got 'all'.*no such module.*layers=\[1\]",
    ),
    ("qwen3_next", "model.layers.{layer}.self_attn.q_norm", [1], "it runs on each head"),
    (
        "mamba",
        "attention_output",
        ALL,
        "it has no self-attention; it has block_output, block_input, mixer_output, mixer_input",
    ),
    ("mamba", "backbone.layers.{layer}.mixer.conv1d", ALL, r"channels first"),
    ("rwkv", "attention_output", ALL, "no such part"),
    ("bart", "model.decoder.layers.{layer}.encoder_attn.k_proj", ALL, "reads the encoder's states"),
    (
        "switch",
        "decoder.block.{layer}.layer.1.EncDecAttention.v",
        ALL,
        "reads the encoder's states",
    ),
    (
        "bert2bert",
        "decoder.bert.encoder.layer.{layer}.crossattention.self.key",
        ALL,
        "reads the encoder's states",
    ),
    ("pegasus_x", "attention_output", ALL, "shifts the rows"),
    ("pegasus_x", "mlp_output", ALL, "runs twice"),
    ("prophetnet", "decoder.block_output", ALL, "predicting streams"),
    ("longformer", "longformer.encoder.layer.{layer}.attention.self.query", ALL, "sequence first"),
    ("mobilebert", "mlp_output", ALL, "more than one feed-forward"),
    ("deepseek_v4", "model.layers.{layer}.attn_hc.input", ALL, "mix the residual streams"),
    ("squeezebert", "block_output", ALL, "component: got 'block_output'.*past every hook"),
    ("funnel", "block_output", ALL, "pool the sequence"),
    ("funnel", "encoder.blocks.0.0", ALL, "pool the sequence"),
    ("xlm", "block_output", ALL, r"'ffns.\{layer\}'"),
    ("vilt", "block_output", ALL, "an image's rows beside the tokens"),
    ("swin", "attention_output", ALL, "stage of several blocks"),
    ("swin", "swin.encoder.layers.{layer}.blocks.0.attention", ALL, "runs on windows"),
    ("convnext", "block_output", ALL, r"feature maps \[B, C, H, W\]"),
    ("segformer", "block_output", ALL, r"feature maps \[B, C, H, W\]"),
    ("wav2vec2", "feature_extractor.conv_layers.{layer}", ALL, "channels first"),
    (
        "opt",
        "model.decoder.layers.{layer}.activation_fn",
        ALL,
        "embed_dim: got None, but the width",
    ),
]


@pytest.mark.parametrize(("family", "name", "layers", "message"), UNSUPPORTED_FAMILIES)
def test_what_cannot_be_edited_is_refused_with_the_reason(family, name, layers, message):
    with pytest.raises(ValueError, match=message):
        resolve(make(family), name, layers)


class Shared(nn.Module):
    """A block that two layers share."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def test_one_module_of_two_layers_is_refused():
    model, block = nn.Module(), Shared()
    model.blocks = nn.ModuleList([block, block])
    with pytest.raises(
        ValueError, match=r"component: got 'mlp_output'.*are one module.*layers=\[0\]"
    ):
        resolve(model, "mlp_output")
    assert resolve(model, "mlp_output", [0]).targets[0].path == "blocks.0.mlp"


def test_feed_forwards_that_run_on_chunks_are_refused():
    model = make("albert")
    model.config.chunk_size_feed_forward = 4
    with pytest.raises(ValueError, match="chunk_size_feed_forward = 0"):
        resolve(model, "mlp_output")
    assert resolve(model, "block_output").targets


def test_an_absent_stage_of_a_path_keeps_its_place():
    model = nn.Module()
    model.blocks = nn.ModuleList([Shared(), nn.Identity(), Shared()])
    targets = resolve(model, "blocks.{layer}.mlp").targets
    assert [t.present for t in targets] == [True, False, True]
    assert {t.embed_dim for t in targets} == {6}
    assert [t.layer for t in targets] == [0, 1, 2]
