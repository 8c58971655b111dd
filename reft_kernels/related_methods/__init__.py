"""Neighbours of ReFT that need a little more than LoReFT: each a small module over the engine's
operators.

    ReftR1          h + mean(top-k ReLU(h w)) w           AxBench, Wu et al. 2025, arXiv:2501.17148
    RePS            h + (f + b) w, or h without its w     Wu et al. 2025, arXiv:2505.20809
    BREP            scale * h + bias on a prefix          Liang et al. 2025, arXiv:2511.10707
    LoFiT, JoLA     (1 + a) z + v for each head           Yin et al. 2024, arXiv:2406.01563; Lai et
                    al. 2025, arXiv:2502.01179

RED itself is :class:`reft_kernels.RED`.
"""

from reft_kernels.related_methods.brep import BREP, prefix_rows
from reft_kernels.related_methods.heads import HeadSelection, JoLA, LoFiT
from reft_kernels.related_methods.reft_r1 import ReftR1
from reft_kernels.related_methods.reps import RePS

__all__ = ["BREP", "HeadSelection", "JoLA", "LoFiT", "RePS", "ReftR1", "prefix_rows"]
