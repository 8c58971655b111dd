"""Methods related to ReFT, as modules built on the same operators.

    ReftR1   h + mean(top-k ReLU(h . w)) w               Wu et al. 2025, arXiv:2501.17148 (AxBench)
    RePS     h + (f + b) w, or h - (h . w) / |w|^2 w     Wu et al. 2025, arXiv:2505.20809
    BREP     scale * h + bias on a prefix                Liang et al. 2025, arXiv:2511.10707
    LoFiT    z + v or (1 + a) z per attention head       Yin et al. 2024, arXiv:2406.01563
    JoLA     (1 + g a) z + k v per attention head        Lai et al. 2025, arXiv:2502.01179

RED is :class:`reft_kernels.RED`.
"""

from reft_kernels.related_methods.brep import BREP, prefix_rows
from reft_kernels.related_methods.heads import HeadSelection, JoLA, LoFiT
from reft_kernels.related_methods.reft_r1 import ReftR1
from reft_kernels.related_methods.reps import RePS

__all__ = ["BREP", "HeadSelection", "JoLA", "LoFiT", "RePS", "ReftR1", "prefix_rows"]
