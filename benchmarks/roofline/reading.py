"""What the loops of a compiled kernel do, read from its machine code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.roofline.code import Block, Code, Instruction, Loop, blocks, loops

_TENSOR = ("HMMA", "HGMMA", "IMMA", "QMMA", "QGMMA", "DMMA", "OMMA", "UTCHMMA", "UTCQMMA")
_BULK = ("UBLKCP", "UTMALDG")
_CONVERSIONS = ("F2F", "I2F", "F2I", "I2FP", "FRND", "F2FP")
_WAITING = ("try_wait", "TRYWAIT", "NANOSLEEP")
_LONGEST_SPIN = 12  # instructions
_AMD = ("s_", "v_", "ds_", "global_", "buffer_", "flat_", "scratch_")
_AMD_WIDTHS = {
    "ubyte": 1,
    "byte": 1,
    "sbyte": 1,
    "ushort": 2,
    "short": 2,
    "sshort": 2,
    "dword": 4,
    "dwordx2": 8,
    "dwordx3": 12,
    "dwordx4": 16,
}


@dataclass
class Region:
    """Counts of the instructions of a loop without its inner loops, or outside of all loops.

    Attributes:
        instructions: All instructions.
        barriers: Barriers of the program, and waits for asynchronous transfers by mbarrier.
        exchanges: Those of them that are of a cluster, or for transfers between its blocks.
        loads, stores, copies: Accesses to global memory by bytes per thread. Copies go to shared
            memory without registers.
        bulk: Copies by the copy engine.
        scalar_conversions: Conversions of one number between floating-point types.
        packed_conversions: Conversions of two numbers at once.
        tensor: Matrix instructions.
        shuffles: Exchanges between the lanes of a warp.
        shared: Accesses to shared memory.
        atomics: Atomic operations on global memory.
        local: Bytes per thread that are stored to local memory, to which registers are spilled.
        inner: The inner loops, in the order of their addresses.
    """

    instructions: int = 0
    barriers: int = 0
    exchanges: int = 0
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    copies: Counter[int] = field(default_factory=Counter)
    bulk: int = 0
    scalar_conversions: int = 0
    packed_conversions: int = 0
    tensor: int = 0
    shuffles: int = 0
    shared: int = 0
    atomics: int = 0
    local: int = 0
    inner: list[Region] = field(default_factory=list)

    def add(self, instruction: Instruction) -> None:
        """Count an instruction."""
        self.instructions += 1
        if instruction.opcode.startswith(_AMD):
            self._add_amd(instruction.opcode)
        elif instruction.opcode[0].islower():
            self._add_ptx(instruction)
        else:
            self._add_nvidia(instruction)

    def _add_nvidia(self, instruction: Instruction) -> None:
        parts = instruction.opcode.split(".")
        name = parts[0]
        if name == "UCGABAR_WAIT" or (name == "SYNCS" and "TRYWAIT" in parts):
            self.barriers += 1
            self.exchanges += 1
        elif name == "BAR" and "ARV" not in parts:
            self.barriers += 1
        elif name in ("LDG", "LD"):
            self.loads[_width(parts)] += 1
        elif name in ("STG", "ST"):
            self.stores[_width(parts)] += 1
        elif name == "LDGSTS":
            self.copies[_width(parts)] += 1
        elif name in _BULK:
            self.bulk += 1
        elif name in _CONVERSIONS:
            both = name == "F2FP" and "RZ" not in instruction.operands
            self.packed_conversions += both
            self.scalar_conversions += not both
        elif name in _TENSOR:
            self.tensor += 1
        elif name in ("SHFL", "REDUX", "CREDUX"):
            self.shuffles += 1
        elif name in ("LDS", "STS", "LDSM", "STSM", "ATOMS"):
            self.shared += 1
        elif name in ("ATOMG", "ATOM", "RED", "REDG"):
            self.atomics += 1
        elif name == "STL":
            self.local += _width(parts)

    def _add_ptx(self, instruction: Instruction) -> None:
        parts = instruction.opcode.split(".")
        name = parts[0]
        vector = next((int(part[1:]) for part in parts if part in ("v2", "v4", "v8")), 1)
        if name in ("ld", "st") and "global" in parts:
            width = vector * int(parts[-1].lstrip("busf")) // 8
            (self.loads if name == "ld" else self.stores)[width] += 1
        elif instruction.opcode.startswith(("cp.async.ca", "cp.async.cg")):
            self.copies[int(instruction.operands[2], 0)] += 1
        elif instruction.opcode.startswith("cp.async.bulk"):
            self.bulk += "global" in instruction.opcode
        elif name in ("bar", "barrier"):
            self.barriers += 1
        elif name in ("mma", "wgmma", "tcgen05"):
            self.tensor += "mma" in parts or "sync" in parts or "mma_async" in parts
        elif name == "shfl":
            self.shuffles += 1
        elif name in ("atom", "red"):
            self.atomics += 1

    def _add_amd(self, opcode: str) -> None:
        access = re.match(
            r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+?)(?:_d16\w*)?$", opcode
        )
        if access:
            width = _AMD_WIDTHS.get(access[2].replace("b128", "dwordx4"), 4)
            target = self.copies if "_lds_" in opcode else self.loads
            (target if access[1] == "load" else self.stores)[width] += 1
        elif opcode.startswith("s_barrier"):
            self.barriers += 1
        elif opcode.startswith("v_cvt"):
            packed = "_pk" in opcode
            self.packed_conversions += packed
            self.scalar_conversions += not packed
        elif opcode.startswith(("v_mfma", "v_smfma", "v_wmma")):
            self.tensor += 1
        elif opcode.startswith(("ds_bpermute", "ds_permute", "ds_swizzle")) or "_dpp" in opcode:
            self.shuffles += 1
        elif opcode.startswith("ds_"):
            self.shared += 1
        elif "_atomic_" in opcode:
            self.atomics += 1
        elif opcode.startswith("scratch_store"):
            self.local += 4


def _width(parts: Sequence[str]) -> int:
    """Return the bytes per thread of an NVIDIA access."""
    for part in reversed(parts):
        if part in ("256", "128", "64"):
            return int(part) // 8
        if part in ("U16", "S16"):
            return 2
        if part in ("U8", "S8"):
            return 1
    return 4


def _spins(code: Code, graph: Sequence[Block], loop: Loop) -> bool:
    """Return whether a loop only waits for an mbarrier or an allocation of tensor memory."""
    inside = [
        instruction
        for number in loop.blocks
        for instruction in code.instructions[graph[number].start : graph[number].stop]
    ]
    waits = any(word in i.opcode for i in inside for word in _WAITING)
    return waits and len(inside) <= _LONGEST_SPIN


def structure(code: Code) -> tuple[list[Block], list[Loop], frozenset[int]]:
    """Return the blocks, the loops that do work, and the blocks of loops that only wait."""
    graph = blocks(code)
    waiting: set[int] = set()

    def working(tree: Sequence[Loop]) -> list[Loop]:
        kept = []
        for loop in tree:
            if _spins(code, graph, loop):
                waiting.update(loop.blocks)
            else:
                loop.inner = working(loop.inner)
                kept.append(loop)
        return kept

    return graph, working(loops(graph)), frozenset(waiting)


def read(code: Code) -> Region:
    """Return the counts outside of all loops; ``inner`` has those of the loops.

    A wait for an mbarrier is a first attempt and a loop of further ones; it is counted once.
    """
    graph, tree, waiting = structure(code)

    def count(numbers: Sequence[int]) -> Region:
        region = Region()
        for number in numbers:
            for instruction in code.instructions[graph[number].start : graph[number].stop]:
                if number not in waiting or "TRYWAIT" not in instruction.opcode:
                    region.add(instruction)
        return region

    def of(loop: Loop) -> Region:
        region = count(loop.own_blocks())
        region.inner = [of(inner) for inner in loop.inner]
        return region

    inside = frozenset().union(*(loop.blocks for loop in tree))
    region = count([k for k in range(len(graph)) if k not in inside])
    region.inner = [of(loop) for loop in tree]
    return region


def walk(region: Region) -> list[Region]:
    """Return all loops inside a region, each before the loops inside it."""
    return [found for inner in region.inner for found in (inner, *walk(inner))]


def total(region: Region, name: str) -> int:
    """Return the sum of a count over the region and all loops inside it."""
    return sum(getattr(part, name) for part in (region, *walk(region)))
