"""Which instructions of a PTX kernel its addresses and branches depend on."""

from __future__ import annotations

import re

from benchmarks.roofline.code import Instruction
from benchmarks.roofline.integers import Unsupported
from benchmarks.roofline.ptx import Kernel

_REGISTER = re.compile(r"%[\w.]+")
_NO_RESULT = ("bar", "barrier", "membar", "fence", "nanosleep", "prefetch", "griddepcontrol")


def names(operand: str) -> list[str]:
    """Return the registers in an operand."""
    return _REGISTER.findall(operand)


def memory_access(instruction: Instruction) -> tuple[str, str] | None:
    """Return the kind and the state space of a memory access, or None."""
    parts = [part.split("::")[0] for part in instruction.opcode.split(".")]
    if parts[0] in ("ld", "st") and "param" not in parts:
        space = next((p for p in parts if p in ("global", "shared", "local", "const")), "generic")
        return ("load" if parts[0] == "ld" else "store"), space
    if parts[0] == "ldu":
        return "load", "global"
    if parts[0] in ("atom", "red"):
        return "atomic", "shared" if "shared" in parts else "global"
    if instruction.opcode.startswith("cp.async.bulk"):
        raise Unsupported(instruction.opcode)
    if instruction.opcode.startswith(("cp.async.ca", "cp.async.cg")):
        return "copy", "global"
    return None


def written(instruction: Instruction) -> list[str]:
    """Return the registers that an instruction writes."""
    name = instruction.opcode.split(".")[0]
    if name in ("st", "red", "bra", "ret", "exit", "trap", *_NO_RESULT) or not instruction.operands:
        return []
    if instruction.operands[0].startswith("["):  # memory
        return []
    return names(instruction.operands[0])


class Slice:
    """The registers on which addresses, branches and predicates depend.

    Args:
        kernel: The kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.registers: set[str] = set()
        self.shared = False  # whether values that were kept in shared memory are needed
        instructions = kernel.code.instructions
        for instruction in instructions:
            self.registers.update(names(instruction.guard))
            if (access := memory_access(instruction)) and access[1] in ("global", "generic"):
                at = 1 if access[0] == "load" or instruction.opcode.startswith("atom") else 0
                at = 1 if access[0] == "copy" else at
                self.registers.update(names(instruction.operands[at]))
                if access[0] == "copy" and len(instruction.operands) > 3:
                    self.registers.update(names(instruction.operands[3]))
        size = -1
        while size != len(self.registers) + self.shared:
            size = len(self.registers) + self.shared
            for instruction in instructions:
                self._add(instruction)

    def _add(self, instruction: Instruction) -> None:
        access = memory_access(instruction)
        if access and access[0] == "copy" and self.shared:
            self.registers.update(names(instruction.operands[0]))
        if access and access[1] in ("shared", "generic"):
            if access[0] == "load" and not self.registers.isdisjoint(written(instruction)):
                self.shared = True
            elif self.shared:
                for operand in instruction.operands:
                    self.registers.update(names(operand))
        if not self.registers.isdisjoint(written(instruction)):
            for operand in instruction.operands[1:]:
                self.registers.update(names(operand))

    def needs(self, instruction: Instruction) -> bool:
        """Return whether an instruction writes such a register."""
        return not self.registers.isdisjoint(written(instruction))
