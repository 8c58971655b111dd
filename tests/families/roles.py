"""Expected modules of components inside blocks, and components that must raise an error."""

from __future__ import annotations

from typing import NamedTuple

from tests.families.catalogue_vlm import TOWER
from tests.families.family import VERSION_5, Role


class Case(NamedTuple):
    """A role of a family; ``refused`` is part of the error message, or empty."""

    family: str
    role: Role
    refused: str = ""

    def __str__(self) -> str:
        layers = "" if self.role.layers is None else f"-{list(self.role.layers)}"
        return f"{self.family}-{self.role.component}{layers}"


CASES: list[Case] = []


def means(
    family: str,
    component: str,
    at: str | tuple[str, ...],
    layers: tuple[int, ...] | None = None,
    side: str = "output",
    *,
    tokens: bool = True,
) -> None:
    """Add a case: ``component`` of ``family`` resolves to the modules ``at``."""
    templates = (at,) if isinstance(at, str) else at
    CASES.append(Case(family, Role(component, templates, side, layers, tokens)))


def refuses(family: str, component: str, words: str, layers: tuple[int, ...] | None = None) -> None:
    """Add a case: ``component`` raises an error whose message contains ``words``."""
    CASES.append(Case(family, Role(component, (), layers=layers), words))


B = "model.layers.{}"

# ---- hybrids: attention in some layers, another token mixer in the others
for _family, _attention, _mixer, _others in (
    ("qwen3_next", "self_attn", "linear_attn", (0, 2)),
    ("qwen3_5_text", "self_attn", "linear_attn", (0, 2)),
    ("olmo_hybrid", "self_attn", "linear_attn", (0, 2)),
    ("jamba", "self_attn", "mamba", (0, 2)),
    ("bamba", "self_attn", "mamba", (0, 2)),
    ("granitemoehybrid", "self_attn", "mamba", (0, 2)),
    ("lfm2", "self_attn", "conv", (0, 2)),
    ("lfm2_moe", "self_attn", "conv", (0, 2)),
    ("minimax", "self_attn", "self_attn", (0, 2)),
    ("recurrent_gemma", "temporal_block", "temporal_block", (0, 2)),
):
    means(_family, "attention_output", f"{B}.{_attention}", (1,))
    means(_family, "mixer_output", f"{B}.{_mixer}", _others)
    refuses(_family, "attention_output", "layers", None)
    refuses(_family, "mixer_output", "layers", (1,))
means("mamba", "mixer_output", "backbone.layers.{}.mixer")
means("mamba2", "mixer_output", "backbone.layers.{}.mixer")
refuses("mamba", "attention_output", "attention")
refuses("mamba", "mlp_output", "feed-forward")

# ---- feed-forwards
means("llama", "mlp_output", f"{B}.mlp")
means("llama", "mlp_input", f"{B}.mlp", side="input")
means("llama", "mlp_activation", f"{B}.mlp.down_proj", side="input")
means("llama", "block_input", B, side="input")
means("llama", "attention_input", f"{B}.self_attn", side="input")
means("llama", "model.layers.{layer}.self_attn.o_proj", f"{B}.self_attn.o_proj")
means("llama", "model.layers[{layer}].mlp.gate_proj.output", f"{B}.mlp.gate_proj")
means("gpt2", "mlp_output", "transformer.h.{}.mlp")
means("gpt2", "attention_output", "transformer.h.{}.attn")
means("gpt_neox", "attention_output", "gpt_neox.layers.{}.attention")
means("bloom", "attention_output", "transformer.h.{}.self_attention")
means("falcon_h1", "mlp_output", f"{B}.feed_forward")
means("jamba", "mlp_output", f"{B}.feed_forward")
means("bamba", "mlp_output", f"{B}.feed_forward")
means("recurrent_gemma", "mlp_output", f"{B}.mlp_block")
means("mixtral", "mlp_output", (f"{B}.mlp", f"{B}.block_sparse_moe"))
means("deepseek_v3", "mlp_output", f"{B}.mlp")
means("qwen3_moe", "mlp_output", f"{B}.mlp")
means("gpt_oss", "mlp_output", f"{B}.mlp")
means("granitemoe", "mlp_output", f"{B}.block_sparse_moe")
means("opt", "mlp_output", "model.decoder.layers.{}.fc2")
means("bart", "mlp_output", "model.encoder.layers.{}.fc2")
means("bart_decoder", "decoder.mlp_output", "model.decoder.layers.{}.fc2")
means("bart", "attention_output", "model.encoder.layers.{}.self_attn")
means("t5", "mlp_output", "encoder.block.{}.layer.1")
means("t5", "attention_output", "encoder.block.{}.layer.0")
means("albert", "mlp_output", "albert.encoder.albert_layer_groups.{}.albert_layers.0.ffn_output")
means("bert", "mlp_output", "bert.encoder.layer.{}.output.dense")
means("bert", "attention_output", "bert.encoder.layer.{}.attention")
means("deepseek_v3", "mlp_activation", f"{B}.mlp.down_proj", (0,), "input")
refuses("deepseek_v3", "mlp_activation", "mixture", (1,))
refuses("mixtral", "mlp_activation", "mixture")
refuses("granitemoehybrid", "mlp_output", "more than one feed-forward")
if VERSION_5:  # the rows of the fused experts are not in the order of the tokens
    refuses("mixtral", "model.layers.{layer}.mlp.experts", "expert")
    EXPERT = "mlp.experts.act_fn"
else:
    EXPERT = "block_sparse_moe.experts.0.w2"
refuses("mixtral", f"model.layers.{{layer}}.{EXPERT}", "expert")
EXPERT = "mlp.experts.act_fn" if VERSION_5 else "mlp.experts.0.down_proj"
refuses("deepseek_v3", f"model.layers.{{layer}}.{EXPERT}", "expert", (1,))
refuses("bart", "model.decoder.layers.{layer}.encoder_attn.k_proj", "encoder")

# ---- two sides
means("bert2bert", "block_output", "encoder.encoder.layer.{}")
means("bert2bert", "encoder.block_output", "encoder.encoder.layer.{}")
means("bert2bert", "attention_output", "encoder.encoder.layer.{}.attention")
for _family, _dec in (
    ("trocr", "decoder.model.decoder.layers.{}"),
    ("vision_encoder_decoder", "decoder.transformer.h.{}"),
):
    _enc = ("encoder.layers.{}", "encoder.encoder.layer.{}")
    means(_family, "encoder.block_output", _enc, tokens=False)
    means(f"{_family}_decoder", "decoder.block_output", _dec)

# ---- towers
means("llava", "mlp_output", "model.language_model.layers.{}.mlp")
means("llava", "attention_output", "model.language_model.layers.{}.self_attn")
means("llava_images", f"{TOWER}.{{layer}}.mlp", f"{TOWER}.{{}}.mlp", tokens=False)
means("llava", "model.multi_modal_projector", "model.multi_modal_projector", tokens=False)
means("gemma3", "model.multi_modal_projector", "model.multi_modal_projector", tokens=False)
means("kosmos2", "image_to_text_projection", "image_to_text_projection", tokens=False)
means("idefics2", "model.connector", "model.connector", tokens=False)
means("clip_images", "vision_model.embeddings", "vision_model.embeddings", tokens=False)
means("qwen3_vl", "model.visual.merger", "model.visual.merger", tokens=False)
MERGERS = "model.visual.deepstack_merger_list.{}"
means("qwen3_vl", MERGERS.format("{layer}"), MERGERS, (0, 1), tokens=False)
refuses("siglip_images", "vision_model.head", "embed_dim: got None, but the width")
refuses("mllama", "model.vision_model.post_tile_positional_embedding", "embed_dim: got None")
means(
    "clip_images",
    "vision_model.encoder.layers.{layer}.self_attn",
    "vision_model.encoder.layers.{}.self_attn",
    tokens=False,
)
means("blip2_t5", "mlp_output", "language_model.encoder.block.{}.layer.1")
means("qwen3_vl", "mlp_output", "model.language_model.layers.{}.mlp")
refuses("resnet", "mlp_output", "resnet")

WIDTHS = {
    "trocr": 24,
    "trocr_decoder": 32,
    "vision_encoder_decoder": 24,
    "vision_encoder_decoder_decoder": 32,
    "llava": 32,
    "llava_images": 24,
    "clip": 32,
    "clip_images": 24,
    "qwen4_exp_text": 64,
    "bert2bert": 32,
}
