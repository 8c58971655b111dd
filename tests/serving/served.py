"""Served adapters with random weights, and what they must compute."""

from __future__ import annotations

import dataclasses

import torch

from reft_kernels.positions import parse
from reft_kernels.serving.adapters import Form, ServedAdapter


def adapter(
    name: str,
    *,
    rank: int = 2,
    width: int = 6,
    layers: tuple[int, ...] = (0, 1),
    positions: str = "f2+l2",
    untied: bool = False,
    form: Form = Form(),  # noqa: B008  (a tuple)
    template: tuple[tuple[int, ...], ...] | None = None,
) -> ServedAdapter:
    """Return an adapter whose content hash is ``name``."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    sets = 1 + untied

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(sets, len(layers), *shape, generator=generator)

    return ServedAdapter(
        folder=f"/adapters/{name}",
        intervention="loreft",
        spec=parse(positions),
        positions=positions,
        untied=untied,
        template=template,
        layers=layers,
        all_layers=False,
        form=form,
        activation=form.activation,
        read=draw(rank, width),
        read_bias=draw(rank),
        write=draw(rank, width),
        base_model=None,
        hash=name,
    )


def renamed(served: ServedAdapter, name: str) -> ServedAdapter:
    """Return a copy with another content hash."""
    return dataclasses.replace(served, hash=name)
