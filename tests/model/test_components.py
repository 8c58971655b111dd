"""Resolving components by role and by path, and the errors for names that do not match."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reft_kernels.model import ROLES, find_blocks, resolve
from tests.model.families import BLOCKS, FAMILIES, LAYERS, WIDTH, blocks, make


@pytest.mark.parametrize("family", list(FAMILIES))
def test_blocks_are_found_by_structure(family):
    model = make(family)
    path, modules = find_blocks(model)
    assert modules is blocks(family, model)
    component = resolve(model, "block_output")
    assert [t.layer for t in component.targets] == list(range(LAYERS))
    assert [t.path for t in component.targets] == [f"{path}.{n}" for n in range(LAYERS)]
    assert all(t.embed_dim == WIDTH and t.side == "output" and t.inplace for t in component.targets)
    backbone = model.get_submodule(component.backbone)
    assert backbone is not model and path.startswith(component.backbone)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("role", [role for role in ROLES if not role.startswith("mixer")])
def test_every_role_of_every_family_names_a_module_of_each_block(family, role):
    model = make(family)
    targets = resolve(model, role).targets
    assert len(targets) == LAYERS
    for target in targets:
        assert isinstance(model.get_submodule(target.path), nn.Module)
        if role == "mlp_activation" and family not in ("gpt2", "bloom"):
            assert target.embed_dim == 64
        assert target.inplace == (role == "block_output")


def test_the_sides_of_an_encoder_decoder_model():
    model = make("t5")
    assert resolve(model, "block_output").backbone == "encoder"
    component = resolve(model, "decoder.block_output")
    assert component.backbone == "decoder" and component.decoder and not component.encoder
    assert component.targets[0].path == "decoder.block.0"
    assert resolve(model, "encoder.mlp_output").encoder
    assert resolve(model, "decoder.block.{layer}.layer.1").decoder


@pytest.mark.parametrize(
    ("path", "expected", "side", "width"),
    [
        (
            "model.layers[{layer}].self_attn.o_proj.output",
            "model.layers.1.self_attn.o_proj",
            "output",
            WIDTH,
        ),
        ("model.layers.{layer}.mlp", "model.layers.1.mlp", "output", WIDTH),
        ("model.layers.{layer}.mlp.down_proj.input", "model.layers.1.mlp.down_proj", "input", 64),
        ("layers.{layer}.mlp.up_proj", "model.layers.1.mlp.up_proj", "output", 64),
        ("model.layers.{layer}.self_attn.k_proj", "model.layers.1.self_attn.k_proj", "output", 16),
        ("model.layers.{layer}.input_layernorm", "model.layers.1.input_layernorm", "output", WIDTH),
        ("model.layers[1].mlp", "model.layers.1.mlp", "output", WIDTH),
        ("model.norm", "model.norm", "output", WIDTH),
    ],
)
def test_paths(path, expected, side, width):
    component = resolve(make("llama"), path)
    target = component.targets[1 if "{layer}" in path else 0]
    assert (target.path, target.side, target.embed_dim) == (expected, side, width)
    assert component.backbone == "model" and not target.inplace


def test_a_module_that_is_called_output_is_a_module():
    targets = resolve(make("bert"), "bert.encoder.layer.{layer}.output").targets
    assert targets[0].path == "bert.encoder.layer.0.output" and targets[0].side == "output"


def test_a_block_named_by_path_is_a_block():
    assert all(t.inplace for t in resolve(make("llama"), "model.layers.{layer}").targets)


def test_layers_keep_their_order():
    assert [t.layer for t in resolve(make("llama"), "block_output", [2, 0]).targets] == [2, 0]


@pytest.mark.parametrize(
    ("component", "layers", "message"),
    [
        (
            "no.such.{layer}.thing",
            "all",
            r"component: got 'no\.such.*block_output.*model\.layers\.\{layer\}",
        ),
        (
            "model.layers.{layer}.mlp.down",
            "all",
            r"component: got .*such as model\.layers\.\{layer\}\.mlp\.down_proj",
        ),
        ("{layer}.{layer}", "all", "at most once"),
        (
            "block_output",
            [0, 3],
            r"layers: got \[0, 3\], expected layer numbers from 0 to 2; \[3\] are out of range",
        ),
        ("model.layers.{layer}.mlp", [7], "layers: got"),
        ("decoder.block_output", "all", "no list of blocks in the decoder"),
    ],
)
def test_what_does_not_match_is_named(component, layers, message):
    with pytest.raises(ValueError, match=message):
        resolve(make("llama"), component, layers)


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(self.norm(x))))


class Custom(nn.Module):
    """A model that is not from transformers, with a second list of modules and an empty stage."""

    def __init__(self, stages: int = 4):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(6, 2)])
        self.trunk = nn.ModuleList([nn.Identity() if n == 1 else Mixer() for n in range(stages)])

    def forward(self, x):
        for block in self.trunk:
            x = block(x)
        return self.heads[0](x)


def test_a_model_of_no_family():
    component = resolve(Custom(), "block_output")
    assert [t.path for t in component.targets] == [f"trunk.{n}" for n in range(4)]
    assert [t.present for t in component.targets] == [True, False, True, True]
    assert {t.embed_dim for t in component.targets} == {6} and component.backbone == ""
    with pytest.raises(
        ValueError,
        match=r"Mixer \(trunk.0\) has no such part: .*; it has block_output, block_input",
    ):
        resolve(Custom(), "attention_output")


def test_an_unknown_width_must_be_passed():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Bilinear(3, 4, 5), nn.Bilinear(3, 4, 5)])
    with pytest.raises(ValueError, match="embed_dim: got None, but the width"):
        resolve(model, "block_output")
    assert resolve(model, "block_output", embed_dim=5).targets[0].embed_dim == 5
    with pytest.raises(ValueError, match="no list of blocks"):
        resolve(nn.Linear(2, 2), "block_output")


def test_block_lists_by_path_exist():
    assert all(make(family).get_submodule(path) for family, path in BLOCKS.items())
