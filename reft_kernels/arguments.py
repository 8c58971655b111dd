"""Arguments that travel together, as named tuples: what an edit consumes beside the hidden
state.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class EditWeights(NamedTuple):
    """What one layer's edit consumes: the arguments of the general operator."""

    read: Tensor | None
    read_bias: Tensor | None
    write: Tensor
    subtract_bias: Tensor | None
    subtract: bool


class RedWeights(NamedTuple):
    """What one layer's RED consumes."""

    scale: Tensor
    bias: Tensor


class Selection(NamedTuple):
    """Which rows an edit works on, and with which weight set and coefficients each."""

    rows: Tensor | None = None
    weight_ids: Tensor | None = None
    coeff: Tensor | None = None
