"""Architectures against plain hooks: where an edit goes, which rows it edits, what its gradients are, what generate gives.

Places are written by hand. The oracle is a hook of plain PyTorch on the same model, with R, W and b of the adapter.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from reft_kernels.integrations.peft import ReftConfig
from reft_kernels.model import resolve
from tests.model.families import mask_of, shake, stacks

VOCAB, WIDTH, LENGTH, LENGTHS = 99, 32, 12, [12, 7, 5]
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "head_dim": 8, **SPECIAL,
}  # fmt: skip
NO_HEAD_DIM = {k: v for k, v in DECODER.items() if k != "head_dim"}
ENCODER = {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "head_dim")}
BART = {
    "vocab_size": VOCAB, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "dropout": 0.0, **SPECIAL,
}  # fmt: skip
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
HYBRID = ["linear_attention", "full_attention", "linear_attention"]
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2, "layer_types": HYBRID,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip


class Family(NamedTuple):
    """How to make a tiny random model, its blocks by hand, and the layout of their hidden states."""

    model: str
    config: str
    settings: dict[str, Any]
    blocks: str
    count: int = 3
    layout: str = "btd"
    generates: bool = True


def causal(name: str, blocks: str = "model.layers", base: dict = DECODER, **settings: Any) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", {**base, **settings}, blocks)


def encoder(model: str, config: str, blocks: str, count: int = 3, **settings: Any) -> Family:
    return Family(model, config, {**ENCODER, **settings}, blocks, count, generates=False)


FAMILIES: dict[str, Family] = {
    "llama": causal("Llama"),
    "mistral": causal("Mistral", sliding_window=8),
    "mixtral": causal("Mixtral", **MOE),
    "qwen2": causal("Qwen2"),
    "qwen3_moe": causal("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "qwen3_next": causal(
        "Qwen3Next", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32, **DELTA
    ),
    "gemma2": causal("Gemma2", sliding_window=8, query_pre_attn_scalar=8),
    "phi3": causal("Phi3"),
    "falcon": causal("Falcon", "transformer.h", NO_HEAD_DIM, new_decoder_architecture=False, multi_query=True),
    "opt": causal("OPT", "model.decoder.layers", ffn_dim=64, word_embed_proj_dim=WIDTH, dropout=0.0),
    "deepseek_v3": causal("DeepseekV3", **LATENT),
    "granitemoe": causal("GraniteMoe", **MOE),
    "jamba": causal(
        "Jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4,
        num_experts_per_tok=2, mamba_d_state=8, use_mamba_kernels=False,
    ),
    "minimax": causal("MiniMax", **MOE, layer_types=HYBRID, block_size=4),
    "mamba": causal("Mamba", "backbone.layers", state_size=8),
    "mamba2": causal("Mamba2", "backbone.layers", state_size=8, num_heads=8, n_groups=1, chunk_size=8),
    "falcon_mamba": causal("FalconMamba", "backbone.layers", state_size=8),
    "rwkv": causal("Rwkv", "rwkv.blocks", attention_hidden_size=WIDTH, context_length=64),
    "deepseek_v4": causal("DeepseekV4")._replace(layout="btsd"),
    "xlnet": Family(
        "XLNetLMHeadModel", "XLNetConfig",
        {"vocab_size": VOCAB, "d_model": WIDTH, "n_layer": 3, "n_head": 4, "d_inner": 64, "dropout": 0.0, **SPECIAL},
        "transformer.layer", layout="tbd", generates=False,
    ),
    "bert": encoder("BertForSequenceClassification", "BertConfig", "bert.encoder.layer"),
    "distilbert": Family(
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"vocab_size": VOCAB, "dim": WIDTH, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "dropout": 0.0, "pad_token_id": 0},
        "distilbert.transformer.layer", generates=False,
    ),
    "electra": encoder("ElectraForSequenceClassification", "ElectraConfig", "electra.encoder.layer", embedding_size=16),
    "longformer": encoder(
        "LongformerForMaskedLM", "LongformerConfig", "longformer.encoder.layer", attention_window=8,
        attention_probs_dropout_prob=0.0,
    )._replace(layout="padded"),
    "bart": Family("BartForConditionalGeneration", "BartConfig", BART, "model.encoder.layers", 2),
    "t5": Family(
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
         "decoder_start_token_id": 0, "pad_token_id": 0},
        "encoder.block", 2,
    ),
}  # fmt: skip


def class_of(name: str) -> Any:
    found = getattr(transformers, name, None)
    if found is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return found


def make(family: Family) -> nn.Module:
    model_class, config = class_of(family.model), class_of(family.config)(**family.settings)
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():  # norms and biases that start at 1 or 0 would hide mistakes
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch(side: str) -> dict[str, torch.Tensor]:
    mask = mask_of(LENGTHS, side, LENGTH)
    ids = torch.randint(5, VOCAB, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    return {"input_ids": ids, "attention_mask": mask}


def chosen(mask: torch.Tensor, ends: list[int] | None = None) -> torch.Tensor:
    """Bool [B, T]: first and last two tokens of each prompt, by plain loops."""
    selected = torch.zeros_like(mask, dtype=torch.bool)
    for row, real in enumerate(mask.bool()):
        columns = real.nonzero().flatten().tolist()[: None if ends is None else ends[row]]
        count = min(2, len(columns) // 2)
        for column in columns[:count] + columns[len(columns) - count :]:
            selected[row, column] = True
    return selected


@contextlib.contextmanager
def oracle(family: Family, model: nn.Module, weights: list, selected: torch.Tensor, once: bool = False):
    """Hooks that edit the chosen tokens of every block; ``once``: of the first call alone."""
    handles, seen = [], set()
    for layer in range(family.count):

        def hook(module, args, output, layer=layer):
            if once and layer in seen:
                return None
            seen.add(layer)
            hidden = output[0] if isinstance(output, tuple) else output
            R, W, b = weights[layer]
            where = selected
            if family.layout == "tbd":
                where = selected.T
            elif family.layout == "btsd":
                where = selected.unsqueeze(-1).expand(hidden.shape[:-1])
            elif family.layout == "padded":
                where = nn.functional.pad(selected, (0, hidden.shape[1] - selected.shape[1]))
            edited = hidden + (hidden @ W.T + b - hidden @ R.T) @ R
            hidden = torch.where(where.unsqueeze(-1), edited, hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handles.append(model.get_submodule(f"{family.blocks}.{layer}").register_forward_hook(hook, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def edited(family: Family) -> tuple[nn.Module, nn.Module, list]:
    """A plain model, the same one with an adapter, and the adapter's R, W, b of each layer."""
    model = get_peft_model(make(family), ReftConfig(rank=4, positions="f2+l2"))
    shake(model, 0.2)
    (stack,) = stacks(model)
    weights = [tuple(t.detach() for t in (stack.R[n], stack.W[n], stack.b[n])) for n in range(family.count)]
    return make(family), model, weights


def extra(family: Family) -> dict[str, torch.Tensor]:
    """What an encoder-decoder's decoder reads."""
    if not family.blocks.startswith(("encoder.", "model.encoder.")):
        return {}
    return {"decoder_input_ids": torch.tensor([[2, 5, 6, 7]]).repeat(len(LENGTHS), 1)}


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


def first_tensor(output: Any) -> torch.Tensor:
    return output.logits


@pytest.mark.filterwarnings("ignore:ReFT")
@pytest.mark.parametrize("name", list(FAMILIES))
def test_rows_and_gradients(name):
    family = FAMILIES[name]
    plain, model, weights = edited(family)
    targets = resolve(make(family), "block_output").targets
    assert [t.path for t in targets] == [f"{family.blocks}.{n}" for n in range(family.count)]
    for side in ("right",) if name == "longformer" else ("right", "left"):
        inputs = batch(side)
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            got = first_tensor(model.eval()(**inputs, **extra(family)))
            with oracle(family, plain, weights, chosen(inputs["attention_mask"])):
                want = first_tensor(plain(**inputs, **extra(family)))
            frozen = first_tensor(plain(**inputs, **extra(family)))
        if got.shape[:2] == real.shape:
            got, want, frozen = got[real], want[real], frozen[real]
        assert close(got, want, 1e-4) and not close(frozen, want, 1e-3)

    leaves = [tuple(t.clone().requires_grad_() for t in layer) for layer in weights]
    inputs, lengths = batch("right"), [8, 5, 4]
    told = {"prompt_lengths": lengths} if name not in ("bart", "t5") and family.generates or name == "xlnet" else {}
    selected = chosen(inputs["attention_mask"], lengths if told else None)
    draw = torch.Generator().manual_seed(3)
    model.train()
    out = first_tensor(model(**inputs, **extra(family), **told))
    mix = torch.randn(out.shape, generator=draw)
    if mix.dim() == 3 and mix.shape[1] == LENGTH:
        mix = mix * inputs["attention_mask"].unsqueeze(-1)
    (out * mix).sum().backward()
    plain.requires_grad_(False).train()
    with oracle(family, plain, leaves, selected):
        (first_tensor(plain(**inputs, **extra(family))) * mix).sum().backward()
    (stack,) = stacks(model)
    for layer, (_, W, b) in enumerate(leaves):
        assert close(stack.W.grad[layer], W.grad, 2e-3) and close(stack.b.grad[layer], b.grad, 2e-3)


@pytest.mark.filterwarnings("ignore:ReFT")
@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.generates])
def test_generate_edits_the_prompt_once(name):
    family = FAMILIES[name]
    plain, model, weights = edited(family)
    inputs = batch("left")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_logits": True}
    options["return_dict_in_generate"] = True
    with oracle(family, plain, weights, chosen(inputs["attention_mask"]), once=True):
        want = plain.generate(**inputs, **options)
    got = model.eval().generate(**inputs, **options)
    assert torch.equal(got.sequences, want.sequences)
    assert all(close(a, b, 1e-4) for a, b in zip(got.logits, want.logits, strict=True))


@pytest.mark.parametrize(
    ("name", "role", "layers", "path"),
    [
        ("qwen3_next", "attention_output", [1], "model.layers.1.self_attn"),
        ("qwen3_next", "mixer_output", [2], "model.layers.2.linear_attn"),
        ("jamba", "attention_output", [1], "model.layers.1.self_attn"),
        ("jamba", "mixer_input", [0, 2], "model.layers.0.mamba"),
        ("minimax", "attention_output", [1], "model.layers.1.self_attn"),
        ("minimax", "mixer_output", [0], "model.layers.0.self_attn"),
        ("granitemoe", "mlp_output", "all", "model.layers.0.block_sparse_moe"),
        ("deepseek_v3", "mlp_activation", [0], "model.layers.0.mlp.down_proj"),
        ("opt", "mlp_output", "all", "model.decoder.layers.0.fc2"),
        ("bart", "mlp_input", "all", "model.encoder.layers.0.fc1"),
        ("bart", "decoder.attention_output", "all", "model.decoder.layers.0.self_attn"),
        ("bert", "mlp_output", "all", "bert.encoder.layer.0.output.dense"),
    ],
)
def test_roles(name, role, layers, path):
    assert resolve(make(FAMILIES[name]), role, layers).targets[0].path == path


@pytest.mark.parametrize(
    ("name", "component", "message"),
    [
        ("qwen3_next", "attention_output", r"layers: .*layers \[0, 2\].*expected layers among \[1\]"),
        ("mixtral", "mlp_activation", "mixture of experts, which has no single activation"),
        ("bart", "model.decoder.layers.{layer}.encoder_attn.k_proj", "reads the encoder's states"),
        ("mamba", "attention_output", "it has no self-attention"),
    ],
)
def test_what_a_family_does_not_have_is_refused_when_attached(name, component, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(make(FAMILIES[name]), ReftConfig(rank=4, component=component))


@pytest.mark.parametrize(
    ("model", "config", "settings"),
    [
        ("SqueezeBertModel", "SqueezeBertConfig", {**ENCODER, "embedding_size": WIDTH}),
        ("FunnelModel", "FunnelConfig", {"vocab_size": VOCAB, "block_sizes": [1, 1], "d_model": WIDTH, "n_head": 4}),
        ("ConvNextModel", "ConvNextConfig", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
        ("XLMModel", "XLMConfig", {"vocab_size": VOCAB, "emb_dim": WIDTH, "n_layers": 2, "n_heads": 4}),
    ],
)
def test_architectures_that_are_refused_by_name(model, config, settings):
    with pytest.raises(ValueError, match=f"component: .*{model}"):
        get_peft_model(class_of(model)(class_of(config)(**settings)), ReftConfig(rank=4))


def test_towers_have_their_own_width_and_rows():
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 8,
              "patch_size": 4}  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**NO_HEAD_DIM), vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_index=98, image_seq_length=4,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    assert {t.embed_dim for t in resolve(model, "block_output").targets} == {WIDTH}
    projector = get_peft_model(model, ReftConfig(rank=4, positions="f2+l2", component="model.multi_modal_projector"))
    shake(projector)
    ids = torch.tensor([[1] + [98] * 4 + list(range(5, 90))] * 4)
    with torch.no_grad():
        out = projector(input_ids=ids, pixel_values=torch.randn(4, 3, 8, 8), attention_mask=torch.ones_like(ids))
    assert torch.isfinite(out.logits).all()


def test_the_sides_of_two_berts():
    settings = {**ENCODER, "num_hidden_layers": 2}
    encoder_config = transformers.BertConfig(**settings)
    decoder_config = transformers.BertConfig(**settings, is_decoder=True, add_cross_attention=True)
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder_config, decoder_config)
    model = transformers.EncoderDecoderModel(both)
    for role in ("block_output", "encoder.block_output"):
        assert resolve(model, role).targets[0].path == "encoder.encoder.layer.0"
    assert resolve(model, "decoder.block_output").targets[0].path == "decoder.bert.encoder.layer.0"
