"""Memory of a recorded launch, and what a program's execution counts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

SECTOR = 32  # bytes of one transfer between L2 and L1


@dataclass(frozen=True)
class Buffer:
    """Memory that a pointer argument refers to.

    Attributes:
        name: Name of the argument.
        address: Address of its first byte.
        size: Size in bytes.
        content: Its bytes, or None if no address depends on them.
    """

    name: str
    address: int
    size: int
    content: np.ndarray | None = None


@dataclass
class Access:
    """What one instruction does to global memory in one program.

    Attributes:
        buffer: Name of the argument.
        kind: "load", "store", "copy" (asynchronous copy to shared memory) or "atomic".
        width: Bytes per thread.
        requests: Number of executions by a warp.
        requested: Bytes, summed over threads.
        sectors: Sectors, summed over executions by a warp.
        touched: Distinct sectors.
    """

    buffer: str
    kind: str
    width: int
    requests: int = 0
    requested: int = 0
    sectors: int = 0
    touched: set[int] = field(default_factory=set)


@dataclass
class Trace:
    """Result of an execution.

    Attributes:
        counts: How often each instruction was executed by a warp, as the sum over warps.
        accesses: Accesses to global memory by position of the instruction.
        warps: Number of warps.
    """

    counts: np.ndarray
    accesses: dict[int, Access]
    warps: int

    def iterations(self, at: int) -> int:
        """Return how often the warp that executes an instruction most often may execute it."""
        return -(-int(self.counts[at]) // self.warps)
