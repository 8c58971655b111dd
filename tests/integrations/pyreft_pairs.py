"""Drop-in interventions together with the original pyreft or pyvene classes."""

from __future__ import annotations

import pytest
import torch

pyreft = pytest.importorskip("pyreft", reason="needs pyreft")
pyvene = pytest.importorskip("pyvene", reason="needs pyvene")

from reft_kernels.integrations import pyreft as drop_in  # noqa: E402
from tests.model.families import LAYERS, WIDTH, batch, make  # noqa: E402

REFT = ["Loreft", "Noreft", "Consreft", "Lobireft", "Direft", "Nodireft"]
ALL = [*REFT, "LowRankRotatedSpace"]
ROTATED = [name for name in ALL if name not in ("Noreft", "Nodireft")]
D, r = 24, 4
FREE, BASE = (
    "rotate_layer.parametrizations.weight.original",
    "rotate_layer.parametrizations.weight.0.base",
)


def ours(name, d=D, rank=r, **kwargs):
    kwargs = {"dtype": torch.float32, "add_bias": True, **kwargs}
    return getattr(drop_in, f"{name}Intervention")(embed_dim=d, low_rank_dimension=rank, **kwargs)


def theirs(name, d=D, rank=r, **kwargs):
    kwargs = {"dtype": torch.float32, "add_bias": True, **kwargs}
    package = pyvene if name == "LowRankRotatedSpace" else pyreft
    return getattr(package, f"{name}Intervention")(embed_dim=d, low_rank_dimension=rank, **kwargs)


def pair(name, **kwargs):
    """Return an original and a drop-in with the same weights, drop-in first."""
    original = theirs(name, **kwargs)
    fused = ours(name, **kwargs)
    fused.load_state_dict(original.state_dict())
    return fused, original


def moved(intervention, scale=0.3):
    """Change every parameter of an intervention, as training does.

    R changes by its free parameter.
    """
    with torch.no_grad():
        for name, parameter in intervention.named_parameters():
            step = scale * torch.randn(parameter.shape)
            parameter.add_(step.tril(-1) if "rotate_layer" in name else step)
    return intervention


def weight_of(intervention):
    """Return R^T [d, r]."""
    return intervention.rotate_layer.weight.detach()


def reft_model(classes, name, dtype=torch.float32, **kwargs):
    model = make("llama").to(dtype)
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": r,
            "intervention": classes(name, d=WIDTH, **kwargs).to(dtype),
        }
        for layer in range(LAYERS)
    ]
    return pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))


def model_inputs():
    inputs = batch("llama")
    labels = inputs.pop("labels")
    locations = [[[0, 1, 5], [2, 3, 4], [0, 7, 8]]] * LAYERS
    return inputs, {"labels": labels, "unit_locations": {"sources->base": (None, locations)}}
