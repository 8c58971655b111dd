"""The common form of a saved adapter, independent of the file format.

The weights of one set are a dictionary of tensors, named as in the edit
h + write^T (act(read h + bias) - write h):

    write          [r, d]  R (orthonormal rows) or W2.
    read           [r, d]  W or W1. Absent for ConsReFT and LobiReFT.
    bias           [r]     b, or the constant s.
    subtract_bias  [r]     b2 of NoReFT with ``add_bias``. Absent otherwise.
    X              [d, r]  Unconstrained parameters of R, if the source has them; ``write`` is then
                           computed from X and signs.
    signs          [r]     Signs of the rows of R. Present together with X.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reft_kernels import positions as positions_module
from reft_kernels.adapter_files import ConversionError
from reft_kernels.interventions import STACKED, Intervention

Weights = dict[str, Tensor]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPARE = "spare"


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings chosen by the user; None keeps the setting of the source."""

    layers: str | list[int] | None = None
    positions: str | None = None
    component: str | None = None
    intervention: str | None = None
    activation: str | None = None
    base_model: str | None = None
    dtype: str | None = None
    pyreft_positions: bool | None = None
    without_head: bool = False


@dataclasses.dataclass
class SavedAdapter:
    """An adapter: its settings and weights.

    Attributes:
        intervention: A name from :data:`reft_kernels.interventions.STACKED`.
        component: The edited component, as in the PEFT configuration.
        layers: Weight sets by layer number: one set, or two (first and last positions) if untied.
        positions: Position spec, or None if unknown.
        pyreft_positions: Whether positions are counted as in pyreft's ReftDataset classes.
        all_layers: Whether ``layers`` covers all layers of the model.
        activation: Canonical activation name.
        dropout: Dropout probability.
        parametrization: Parametrization of X.
        base_model: Name or path of the base model, or None.
        spare: Unused weight sets that the source stores, by layer number.
        details: Settings specific to a format, by format, for converting back.
        unheld: Names of settings that the source's format does not contain.
        notes: Messages for the user.
    """

    intervention: str
    component: str
    layers: dict[int, list[Weights]]
    positions: str | None = None
    pyreft_positions: bool = False
    all_layers: bool = False
    activation: str = "linear"
    dropout: float = 0.0
    parametrization: str = "householder"
    base_model: str | None = None
    spare: dict[int, Weights] = dataclasses.field(default_factory=dict)
    details: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    unheld: tuple[str, ...] = ()
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def kind(self) -> type[Intervention]:
        """The class of the intervention."""
        return STACKED[self.intervention]

    @property
    def first(self) -> Weights:
        """The first weight set of the first layer."""
        return next(iter(self.layers.values()))[0]

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.first["write"].shape[0]

    @property
    def embed_dim(self) -> int:
        """The dimension d of the hidden states."""
        return self.first["write"].shape[1]

    @property
    def untied(self) -> bool:
        """Whether first and last positions have separate weights."""
        return len(next(iter(self.layers.values()))) == 2

    def sets(self) -> Iterator[tuple[int, str, Weights]]:
        """Yield (layer, label, weights) of all sets; the label is the set's index or "spare"."""
        for layer, sets in self.layers.items():
            for index, weights in enumerate(sets):
                yield layer, str(index), weights
        for layer, weights in self.spare.items():
            yield layer, SPARE, weights

    def flat(self) -> dict[str, Tensor]:
        """Return all tensors by "layer.label.name"."""
        return {
            f"{layer}.{label}.{name}": t
            for layer, label, weights in self.sets()
            for name, t in weights.items()
        }

    def describe(self) -> str:
        """Return a one-line summary."""
        tied = "untied " if self.untied else ""
        return (
            f"{tied}{self.intervention}, rank {self.rank}, width {self.embed_dim}, layers "
            f"{sorted(self.layers)}"
        )


def check(adapter: SavedAdapter) -> None:
    """Check the weights and positions of an adapter.

    Raises:
        ConversionError: If the layers have different numbers of sets, a tensor is missing or has
            the wrong shape or dtype, or the positions do not fit.
    """
    if not adapter.layers:
        raise ConversionError("layers: the source holds none")
    kind = adapter.kind
    if adapter.first["write"].dim() != 2:
        raise ConversionError(
            f"write: R or W2 is {tuple(adapter.first['write'].shape)}, expected [r, d]"
        )
    rank, width = adapter.first["write"].shape
    shapes = {
        "write": (rank, width),
        "read": (rank, width),
        "bias": (rank,),
        "subtract_bias": (rank,),
        "X": (width, rank),
        "signs": (rank,),
    }
    required = {"write", "bias"} | ({"read"} if kind.reads else set())
    count = len(next(iter(adapter.layers.values())))
    for layer, sets in adapter.layers.items():
        if len(sets) != count or count > 2:
            raise ConversionError(
                f"layer {layer}: got {len(sets)} interventions, expected {min(count, 2)}, one or "
                "two for every layer"
            )
    for layer, label, weights in adapter.sets():
        where = f"layer {layer}, set {label}"
        missing = sorted(required - weights.keys())
        if missing:
            raise ConversionError(
                f"{where}: {adapter.intervention} needs {', '.join(missing)}, which the source "
                "lacks"
            )
        for name, tensor in weights.items():
            if tuple(tensor.shape) != shapes[name] or not tensor.dtype.is_floating_point:
                raise ConversionError(
                    f"{where}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                    f"floating-point {shapes[name]}"
                )
    if adapter.positions is not None:
        spec = parse_positions(adapter.positions)
        if adapter.untied and not (spec.first and spec.last):
            raise ConversionError(
                f"positions: got {adapter.positions!r}, expected 'fN+lM': the source has two "
                "interventions a layer"
            )


def parse_positions(spec: str) -> positions_module.Spec:
    """Parse a position spec.

    Raises:
        ConversionError: If the spec is invalid.
    """
    try:
        return positions_module.parse(spec)
    except (TypeError, ValueError) as error:
        raise ConversionError(str(error)) from None


def required_positions(adapter: SavedAdapter) -> positions_module.Spec:
    """Return the parsed positions of an adapter.

    Raises:
        ConversionError: If they are unknown.
    """
    if adapter.positions is None:
        example = "f5+l5" if adapter.untied else "f7+l7"
        raise ConversionError(
            f"positions: a pyreft folder does not hold them; say --positions, such as {example}"
        )
    return parse_positions(adapter.positions)


def select_layers(adapter: SavedAdapter, layers: str | list[int] | None) -> None:
    """Remove all layers of an adapter except the given ones.

    Args:
        adapter: Changed in place.
        layers: Layer numbers; "all" or None keeps all layers.

    Raises:
        ConversionError: If the adapter lacks one of the layers.
    """
    if layers is None or isinstance(layers, str):
        return
    missing = [n for n in layers if n not in adapter.layers]
    if missing:
        raise ConversionError(
            f"layers: got {layers}, but the source has {sorted(adapter.layers)}: {missing} are "
            "not there"
        )
    if set(layers) != set(adapter.layers):
        adapter.all_layers = False
    adapter.layers = {n: adapter.layers[n] for n in layers}
    adapter.spare = {n: w for n, w in adapter.spare.items() if n in adapter.layers}


def fold_subtract_bias(adapter: SavedAdapter, weights: Weights, target: str) -> Tensor:
    """Return the bias for a target format without b2.

    With a linear activation, b - b2 gives the same edit.

    Args:
        adapter: The adapter.
        weights: One of its weight sets.
        target: Name of the target format for error messages.

    Returns:
        ``[r]``.

    Raises:
        ConversionError: If b2 is not zero and the activation is not linear.
    """
    b2 = weights.get("subtract_bias")
    if b2 is None or not adapter.kind.subtract_projection or not b2.any():
        return weights["bias"]
    if adapter.activation != "linear":
        raise ConversionError(
            f"add_bias: {target} has no bias of the projection, and it folds into b only where "
            "the activation is linear, "
            f"not {adapter.activation!r}"
        )
    wide = weights["bias"].double() - b2.double()
    return wide.to(torch.promote_types(weights["bias"].dtype, torch.float32))


def cast(tensor: Tensor, name: str | None) -> Tensor:
    """Return a contiguous copy in a dtype given by name; None means fp32."""
    return tensor.detach().to(DTYPES[name or "float32"], copy=True).contiguous()


def bits(tensor: Tensor) -> Tensor:
    """Return the bits of the values in fp64, as int64.

    The conversion to fp64 is exact, so equal bits mean equal values, including the sign of zero.
    """
    return tensor.detach().double().contiguous().view(torch.int64)


def digest(adapter: SavedAdapter) -> str:
    """Return the SHA-256 digest of an adapter's stored weights.

    It covers the name, dtype, shape and bytes of all tensors, except ``write`` if X is stored.
    """
    total = hashlib.sha256()
    for layer, label, weights in sorted(adapter.sets(), key=lambda item: item[:2]):
        for name, tensor in sorted(weights.items()):
            if name == "write" and "X" in weights:
                continue
            total.update(f"{layer}.{label}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
