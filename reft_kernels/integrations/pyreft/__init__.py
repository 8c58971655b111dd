"""pyreft's and pyvene's intervention classes on the fused operators: change the import, keep the
script.

    from reft_kernels.integrations.pyreft import LoreftIntervention     # instead of: from pyreft
    import LoreftIntervention

The classes go into ``pyreft.ReftConfig`` and ``pyreft.get_reft_model`` unchanged, and their state
dicts load into the originals and back. Importing this package needs pyvene and transformers, not
pyreft.
"""

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


def __getattr__(name: str):
    if name == "accelerate_pyreft":
        from reft_kernels.integrations.pyreft.accelerate import accelerate_pyreft

        return accelerate_pyreft
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
