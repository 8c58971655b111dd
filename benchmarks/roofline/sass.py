"""SASS, the machine code of NVIDIA GPUs, as ``nvdisasm -c`` or ``nvdisasm -c -gp`` prints it."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.roofline.code import Code, Instruction

_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(.*?)\s*;\s*$")
_ORIGIN = re.compile(r"^\s*//## File \"\.nv_debug_ptx_txt\", line (\d+)")
_LABEL = re.compile(r"^(\.L_x?_?\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_JUMPS = ("BRA", "BRX", "JMP", "CALL")
_NEVER_BACK = ("EXIT", "RET")


@functools.cache
def tool(name: str) -> str:
    """Return the path of ``nvdisasm`` or ``cuobjdump``: Triton's, or that on the PATH.

    Raises:
        FileNotFoundError: If neither exists.
    """
    import triton

    inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(inside) if inside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name}: found neither in the package triton nor on the PATH")
    return found


def _run(name: str, *arguments: str) -> str:
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
    return done.stdout


def disassemble(cubin: bytes, lines: bool = False) -> dict[str, str]:
    """Return the disassembly of each kernel of a cubin; with ``lines`` of the PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _run("nvdisasm", "-c", *["-gp"] * lines, file.name)
    parts = re.split(r"^//-+ \.text\.(\S+)\s+-+$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def resources(cubin: bytes) -> dict[str, dict[str, int]]:
    """Return the registers (REG), stack (STACK) and static shared memory of each kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _run("cuobjdump", "-res-usage", file.name)
    found = re.findall(r"Function (\S+):\s*\n\s*(.*)", text)
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        for name, line in found
    }


def parse(text: str) -> Code:
    """Return the instructions of one kernel.

    Raises:
        ValueError: If the text contains none.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    origin = 0
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif of_ptx := _ORIGIN.match(line):
            origin = int(of_ptx[1])
        elif found := _LINE.match(line):
            instruction = _instruction(found[1] or "", found[2])
            instructions.append(dataclasses.replace(instruction, line=origin))
    if not instructions:
        raise ValueError("text: got no instructions, expected the output of nvdisasm -c")
    return Code(_without_padding(instructions, labels), labels)


def _instruction(guard: str, text: str) -> Instruction:
    opcode, _, rest = text.partition(" ")
    base = opcode.split(".")[0]
    target = _TARGET.search(rest)
    jumps = base in _JUMPS and target is not None
    # A branch may have a predicate among its operands, as in `BRA P1, ...`
    conditional = (
        guard not in ("", "UPT", "PT")
        or ".DIV" in opcode
        or re.search(r"(^|[ ,!])U?P\d", rest) is not None
    )
    ends = base in _NEVER_BACK and not conditional or (base == "BRA" and jumps and not conditional)
    label = target[1] if target is not None and base in ("BRA", "BRX", "JMP") else ""
    operands = tuple(part.strip() for part in rest.split(",")) if rest else ()
    return Instruction(opcode, operands, guard, label, ends)


def _without_padding(
    instructions: list[Instruction], labels: dict[str, int]
) -> tuple[Instruction, ...]:
    """Remove the branch to itself and the NOPs that the assembler puts after the last exit."""
    stop = len(instructions)
    while stop and instructions[stop - 1].opcode == "NOP":
        stop -= 1
    last = instructions[stop - 1]
    if last.label and labels[last.label] == stop - 1:
        stop -= 1
    return tuple(instructions[:stop])
