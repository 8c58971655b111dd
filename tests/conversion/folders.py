"""Folders of each format with random trained weights.

They are made without the code under test, and their weights are returned for comparison.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor, nn

from reft_kernels.integrations.peft import ReftConfig
from reft_kernels.integrations.torch_orthogonal_state import BASE, ORIGINAL
from tests.model.families import LAYERS, WIDTH, make, shake

RANK = 4
CLASSES = {
    "loreft": "LoreftIntervention",
    "direft": "DireftIntervention",
    "noreft": "NoreftIntervention",
    "nodireft": "NodireftIntervention",
    "consreft": "ConsreftIntervention",
    "lobireft": "LobireftIntervention",
}


def peft_folder(path: Path, **config) -> nn.Module:
    """Save a trained PEFT adapter of reft_kernels on the tiny Llama, and return the model."""
    model = get_peft_model(
        make("llama"), ReftConfig(**{"rank": RANK, "init": None, "positions": "f3+l2", **config})
    )
    shake(model)
    model.save_pretrained(path)
    return model.eval()


def _trained(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Return a layer with PyTorch's orthogonal parametrization as after some steps of training.

    Its ``original`` differs from the initial value.
    """
    nn.utils.parametrizations.orthogonal(module)
    original = module.parametrizations.weight.original
    with torch.no_grad():
        noise = 0.2 * torch.randn(original.shape, generator=generator)
        original.add_(noise.tril(-1) if original.shape[0] >= original.shape[1] else noise.triu(1))
    return module


def orthogonal_linear(rank: int, width: int, generator: torch.Generator) -> nn.Linear:
    """Return a [r, d] linear layer with a trained orthonormal weight."""
    return _trained(nn.Linear(width, rank, bias=False), generator)


def hub_folder(
    path: Path,
    *,
    orthogonality: bool = True,
    tied: bool = True,
    prefix: int = 3,
    suffix: int = 2,
    layers: tuple[int, ...] | None = (0, 2),
    width: int = WIDTH,
    rank: int = RANK,
    safetensors: bool = False,
    **config,
) -> dict[str, Tensor]:
    """Save an AdapterHub folder for the tiny Llama, in the format of ``adapters``.

    Returns:
        R (or W2), W and b by "layer.unit.name".
    """
    generator = torch.Generator().manual_seed(3)
    tensors, held = {}, {}
    for layer in range(LAYERS) if layers is None else layers:
        for unit in range(1 if tied else 2):
            where = f"model.layers.{layer}.reft_layer.refts.demo.units.{unit}."
            read, bias = (
                0.2 * torch.randn(rank, width, generator=generator),
                torch.randn(rank, generator=generator),
            )
            tensors |= {f"{where}learned_source.weight": read, f"{where}learned_source.bias": bias}
            if orthogonality:
                linear = orthogonal_linear(rank, width, generator)
                tensors[f"{where}projection.{ORIGINAL}"] = (
                    linear.parametrizations.weight.original.detach()
                )
                tensors[f"{where}projection.{BASE}"] = linear.parametrizations.weight[
                    0
                ].base.contiguous()
                write = linear.weight.detach()
            else:
                write = tensors[f"{where}projection.weight"] = 0.2 * torch.randn(
                    rank, width, generator=generator
                )
            held |= {
                f"{layer}.{unit}.write": write,
                f"{layer}.{unit}.read": read,
                f"{layer}.{unit}.bias": bias,
            }
    settings = {
        "architecture": "reft",
        "dropout": 0.05,
        "dtype": None,
        "init_weights_seed": None,
        "non_linearity": None,
        "layers": "all" if layers is None else list(layers),
        "orthogonality": orthogonality,
        "output_reft": True,
        "prefix_positions": prefix,
        "r": rank,
        "suffix_positions": suffix,
        "tied_weights": tied,
        **config,
    }
    path.mkdir(parents=True)
    content = {
        "config": settings,
        "hidden_size": width,
        "model_class": "LlamaForCausalLM",
        "model_name": "",
        "model_type": "llama",
        "name": "demo",
        "version": "adapters.1.3.0",
    }
    (path / "adapter_config.json").write_text(json.dumps(content))
    if safetensors:
        from safetensors.torch import save_file

        save_file({k: t.contiguous() for k, t in tensors.items()}, path / "adapter.safetensors")
    else:
        torch.save(tensors, path / "pytorch_adapter.bin")
    return held


def hub_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of an AdapterHub folder by "layer.unit.name".

    R is computed by PyTorch's parametrization.
    """
    state = torch.load(path / "pytorch_adapter.bin", weights_only=True)
    held = {}
    for key, tensor in state.items():
        place, _, name = key.partition(".units.")
        layer, (unit, _, name) = place.split(".")[-4], name.partition(".")
        if name.endswith(BASE):
            rank, width = state[key.replace(BASE, ORIGINAL)].shape
            linear = nn.utils.parametrizations.orthogonal(nn.Linear(width, rank, bias=False))
            with torch.no_grad():
                linear.parametrizations.weight.original.copy_(state[key.replace(BASE, ORIGINAL)])
                linear.parametrizations.weight[0].base.copy_(tensor)
            held[f"{layer}.{unit}.write"] = linear.weight.detach()
        elif not name.endswith(ORIGINAL):
            short = {
                "learned_source.weight": "read",
                "learned_source.bias": "bias",
                "projection.weight": "write",
            }[name]
            held[f"{layer}.{unit}.{short}"] = tensor
    return held


def pyreft_model(
    member: str = "loreft",
    *,
    layers=(0, 2),
    untied: bool = False,
    dtype=torch.float32,
    model=None,
    component=None,
):
    """Return pyreft's model on the tiny Llama with trained interventions, and the interventions."""
    import pyreft

    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(6)
    kind = getattr(pyreft, CLASSES[member], None) or getattr(pyreft.interventions, CLASSES[member])
    interventions, representations = [], []
    for layer in list(layers) * (1 + untied):
        made = kind(embed_dim=WIDTH, low_rank_dimension=RANK, dtype=dtype, add_bias=False)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                noise = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(
                    (noise.tril(-1) if "original" in name else noise).to(parameter.dtype)
                )
        interventions.append(made)
        place = "block_output" if component is None else component.format(layer=layer)
        representations.append(
            {"layer": layer, "component": place, "low_rank_dimension": RANK, "intervention": made}
        )
    model = make("llama") if model is None else model
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))
    return reft, interventions
