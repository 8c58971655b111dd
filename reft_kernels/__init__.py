"""Fused kernels for representation finetuning (ReFT).

Importing this package requires only torch. The native CPU library, if it was built, is loaded on
import, so that its kernels are registered before a thread calls one. Other kernels are loaded when
an operator first runs on a device that the backend supports.
"""

from reft_kernels import positions
from reft_kernels.dispatch import BackendError, backend, forced_backend, set_backend
from reft_kernels.functional import consreft, direft, lobireft, loreft, nodireft, noreft, red
from reft_kernels.interventions import RED, ConsReFT, DiReFT, LobiReFT, LoReFT, NodiReFT, NoReFT
from reft_kernels.parametrization import (
    BasePoint,
    base_point,
    cayley,
    cayley_inverse,
    householder,
    householder_inverse,
    orthonormality_error,
    orthonormalize,
)
from reft_kernels.version import __version__

__all__ = [
    "__version__",
    "BackendError",
    "BasePoint",
    "ConsReFT",
    "DiReFT",
    "LoReFT",
    "LobiReFT",
    "NoReFT",
    "NodiReFT",
    "RED",
    "backend",
    "base_point",
    "cayley",
    "cayley_inverse",
    "consreft",
    "direft",
    "forced_backend",
    "householder",
    "householder_inverse",
    "lobireft",
    "loreft",
    "nodireft",
    "noreft",
    "orthonormality_error",
    "orthonormalize",
    "positions",
    "red",
    "set_backend",
]
