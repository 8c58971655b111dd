"""GPUs that kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A GPU architecture.

    Attributes:
        name: Name on the command line.
        backend: Triton's backend.
        arch: Architecture as :class:`triton.backends.compiler.GPUTarget` takes it.
        warp_size: Threads per warp.
        shared_limit: Largest shared memory of a program in bytes.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024),
        Target("sm_90", "cuda", 90, 32, 227 * 1024),
        Target("sm_100", "cuda", 100, 32, 227 * 1024),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
    )
}
