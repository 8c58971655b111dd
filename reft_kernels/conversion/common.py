"""The neutral form of a saved adapter, what all formats share, and the error that names what cannot
be converted.

A set's weights are a dictionary, in the names of the engine's general edit h + write^T (act(read h
+ bias) - write h):

    write          [r, d]  R (orthonormal rows) or W2, as the source evaluates it
    read           [r, d]  W or W1; absent where the source is a constant
    bias           [r]     b, or the constant s
    subtract_bias  [r]     b2 of NoReFT with ``add_bias``; absent elsewhere
    X, signs       [d, r], [r]  free parameters of R, where the source has them: ``write`` is then a
                   function of these
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reft_kernels import positions as positions_module
from reft_kernels.interventions import STACKED, Intervention

Weights = dict[str, Tensor]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPARE = "spare"


class ConversionError(ValueError):
    """What is asked cannot be done: one line that names the file or setting, what came and what
    was expected.
    """


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user says besides the two folders; None leaves it to the source."""

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
class Adapter:
    """One adapter: its settings, and the weights of each layer, one dictionary for each set (two
    where untied: first, last).

    ``unheld`` names the settings that the source's format has no place for; ``spare`` holds weights
    that the source stores and never uses; ``details`` keeps, for each format, what only that format
    says, so that it can be said again on the way back.
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
        """The class: whether R is orthonormal, whether there is a read matrix, whether the
        projection is subtracted.
        """
        return STACKED[self.intervention]

    @property
    def first(self) -> Weights:
        return next(iter(self.layers.values()))[0]

    @property
    def rank(self) -> int:
        return self.first["write"].shape[0]

    @property
    def embed_dim(self) -> int:
        return self.first["write"].shape[1]

    @property
    def untied(self) -> bool:
        return len(next(iter(self.layers.values()))) == 2

    def sets(self) -> Iterator[tuple[int, str, Weights]]:
        """(layer, label, weights) of every set, spare ones last."""
        for layer, sets in self.layers.items():
            for index, weights in enumerate(sets):
                yield layer, str(index), weights
        for layer, weights in self.spare.items():
            yield layer, SPARE, weights

    def flat(self) -> dict[str, Tensor]:
        """Every tensor by "layer.set.name"."""
        return {
            f"{layer}.{label}.{name}": t
            for layer, label, weights in self.sets()
            for name, t in weights.items()
        }

    def describe(self) -> str:
        tied = "untied " if self.untied else ""
        return (
            f"{tied}{self.intervention}, rank {self.rank}, width {self.embed_dim}, layers "
            f"{sorted(self.layers)}"
        )


def check(adapter: Adapter) -> None:
    """Raise unless every layer has the same sets, and every set the tensors of the intervention, in
    one shape.

    Raises:
        ConversionError: naming the layer and the tensor.
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
    """A parsed position spec.

    Raises:
        ConversionError: the spec does not parse.
    """
    try:
        return positions_module.parse(spec)
    except (TypeError, ValueError) as error:
        raise ConversionError(str(error)) from None


def required_positions(adapter: Adapter) -> positions_module.Spec:
    """The adapter's positions.

    Raises:
        ConversionError: nobody said them.
    """
    if adapter.positions is None:
        example = "f5+l5" if adapter.untied else "f7+l7"
        raise ConversionError(
            f"positions: a pyreft folder does not hold them; say --positions, such as {example}"
        )
    return parse_positions(adapter.positions)


def select_layers(adapter: Adapter, wanted: str | list[int] | None) -> None:
    """Keep the layers that are asked for.

    Raises:
        ConversionError: a layer that the source does not have.
    """
    if wanted is None or wanted == "all":
        return
    missing = [n for n in wanted if n not in adapter.layers]
    if missing:
        raise ConversionError(
            f"layers: got {wanted}, but the source has {sorted(adapter.layers)}: {missing} are "
            "not there"
        )
    if set(wanted) != set(adapter.layers):
        adapter.all_layers = False
    adapter.layers = {n: adapter.layers[n] for n in wanted}
    adapter.spare = {n: w for n, w in adapter.spare.items() if n in adapter.layers}


def fold_subtract_bias(adapter: Adapter, weights: Weights, target: str) -> Tensor:
    """The bias of a target without b2: b - b2, which is the same edit where the activation is
    linear and b2 is subtracted.

    Raises:
        ConversionError: a b2 that cannot be folded.
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
    """The tensor in a dtype by name (fp32 for None), contiguous and owning its memory."""
    return tensor.detach().to(DTYPES[name or "float32"], copy=True).contiguous()


def bits(tensor: Tensor) -> Tensor:
    """The values' bits in fp64, which holds every narrower value exactly: equal bits, equal
    values, signs of zero too.
    """
    return tensor.detach().double().contiguous().view(torch.int64)


def digest(adapter: Adapter) -> str:
    """SHA-256 over what the source stores: every tensor's name, dtype, shape and bytes, without
    an R that follows from X.
    """
    total = hashlib.sha256()
    for layer, label, weights in sorted(adapter.sets(), key=lambda item: item[:2]):
        for name, tensor in sorted(weights.items()):
            if name == "write" and "X" in weights:
                continue
            total.update(f"{layer}.{label}.{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
