"""Interventions as modules: parameters, initialization and the edit, for one layer or for L layers.

An intervention edits hidden states of any floating-point dtype; its parameters are fp32 by default.
An orthonormal R is computed from unconstrained parameters ``X`` (see
:mod:`reft_kernels.parametrization`), so it stays orthonormal under any optimizer, weight decay and
rounding. A stacked intervention stores each parameter of its L layers in one tensor. It computes R
(and D = W - R) for all layers in one call, and the gradients of X in another.
"""

from reft_kernels.arguments import EditWeights, RedWeights
from reft_kernels.interventions.base import INITS, Intervention
from reft_kernels.interventions.members import (
    RED,
    ConsReFT,
    DiReFT,
    LobiReFT,
    LoReFT,
    NodiReFT,
    NoReFT,
)
from reft_kernels.interventions.stacked import (
    STACKED,
    StackedConsReFT,
    StackedDiReFT,
    StackedLobiReFT,
    StackedLoReFT,
    StackedNodiReFT,
    StackedNoReFT,
    StackedRED,
)

__all__ = [
    "INITS",
    "RED",
    "STACKED",
    "ConsReFT",
    "DiReFT",
    "EditWeights",
    "Intervention",
    "LoReFT",
    "LobiReFT",
    "NoReFT",
    "NodiReFT",
    "RedWeights",
    "StackedConsReFT",
    "StackedDiReFT",
    "StackedLoReFT",
    "StackedLobiReFT",
    "StackedNoReFT",
    "StackedNodiReFT",
    "StackedRED",
]
