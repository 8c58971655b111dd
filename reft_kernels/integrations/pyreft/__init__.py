"""Drop-in replacements for the intervention classes of pyreft and pyvene, on the fused operators.

Replace the import::

    from pyreft import LoreftIntervention
    from reft_kernels.integrations.pyreft import LoreftIntervention

The classes are used with ``pyreft.ReftConfig`` and ``pyreft.get_reft_model`` like the originals,
and state dicts can be loaded in both directions. Importing this package requires pyvene and
transformers; only :func:`accelerate_pyreft` requires pyreft.
"""

from typing import Any

from reft_kernels.integrations.pyreft.fused import FusedIntervention
from reft_kernels.integrations.pyreft.interventions import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    LowRankRotatedSpaceIntervention,
    NodireftIntervention,
    NoreftIntervention,
)
from reft_kernels.integrations.pyreft.rotate import RotateLayer

__all__ = [
    "LoreftIntervention",
    "NoreftIntervention",
    "ConsreftIntervention",
    "LobireftIntervention",
    "DireftIntervention",
    "NodireftIntervention",
    "LowRankRotatedSpaceIntervention",
    "FusedIntervention",
    "RotateLayer",
    "accelerate_pyreft",
]


def __getattr__(name: str) -> Any:
    if name == "accelerate_pyreft":
        from reft_kernels.integrations.pyreft.accelerate import accelerate_pyreft

        return accelerate_pyreft
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
