"""Triton backend: one function per operator of :data:`reft_kernels.dispatch.OPERATORS`."""

from reft_kernels.triton.edit import edit
from reft_kernels.triton.edit_backward import edit_backward
from reft_kernels.triton.orthonormal import (
    cayley,
    cayley_backward,
    householder,
    householder_backward,
)
from reft_kernels.triton.red import red, red_backward

__all__ = [
    "cayley",
    "cayley_backward",
    "edit",
    "edit_backward",
    "householder",
    "householder_backward",
    "red",
    "red_backward",
]
