"""Deprecated name of :mod:`reft_kernels.related_methods`."""

from reft_kernels.deprecation import warn_renamed
from reft_kernels.related_methods import BREP, HeadSelection, JoLA, LoFiT, ReftR1, RePS, prefix_rows

__all__ = ["BREP", "HeadSelection", "JoLA", "LoFiT", "RePS", "ReftR1", "prefix_rows"]

warn_renamed("reft_kernels.neighbours", "reft_kernels.related_methods")
