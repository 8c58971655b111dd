"""Assembly of AMD GPUs, as Triton prints it."""

from __future__ import annotations

import re

from benchmarks.roofline.code import Code, Instruction

_LABEL = re.compile(r"^(\.?L\w+):")
_CODE = re.compile(r"^\s+([a-z]\w+)(?:\s+(.*))?$")


def parse(text: str) -> Code:
    """Return the instructions of the only kernel in the text.

    Raises:
        ValueError: If the text contains none.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        line = line.split(";")[0].rstrip()
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _CODE.match(line):
            opcode, rest = found[1], (found[2] or "").strip()
            branch = opcode.startswith(("s_branch", "s_cbranch"))
            operands = tuple(part.strip() for part in rest.split(",")) if rest else ()
            ends = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
            instructions.append(
                Instruction(opcode, operands, "", operands[0] if branch else "", ends)
            )
        if line.startswith("\t.section") and instructions:
            break
    if not instructions:
        raise ValueError("text: got no instructions, expected AMD assembly")
    return Code(tuple(instructions), labels)


def resources(text: str) -> dict[str, int]:
    """Return the vector registers, bytes of stack, and spilled vector registers of a kernel.

    Spilled scalar registers are not counted: they go to vector registers, not to memory.
    """

    def number(key: str) -> int:
        found = re.findall(rf"\.{key}:\s*(\d+)", text)
        if not found:
            raise ValueError(f"text: got no .{key}, expected Triton's AMD assembly")
        return max(int(value) for value in found)

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),
    }
