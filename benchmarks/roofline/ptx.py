"""PTX, NVIDIA's virtual instruction set, as Triton and nvcc print it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from benchmarks.roofline.code import Code, Instruction

_ENTRY = re.compile(r"\.entry\s+(\S+?)\s*\((.*?)\)[^{]*\{", re.DOTALL)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)[^,\[\]]*?(\w+)(?:\[(\d+)\])?\s*$"
)
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\]")
_LABEL = re.compile(r"^([$\w]+):")
_GUARDED = re.compile(r"^@(!?%?\w+)\s+(.*)$", re.DOTALL)
_WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel: its name and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class Kernel:
    """A kernel in PTX."""

    name: str
    parameters: tuple[Parameter, ...]
    shared: dict[str, int]  # statically declared shared arrays and their sizes
    code: Code


def split(text: str) -> tuple[str, ...]:
    """Split operands at the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return (*parts, last) if last else tuple(parts)


def _parameters(text: str) -> tuple[Parameter, ...]:
    result = []
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        found = _PARAMETER.search(declaration)
        if found is None:
            raise ValueError(f"parameter: got {declaration!r}, expected a .param declaration")
        width = _WIDTHS[found[2].lstrip("busf")]
        result.append(Parameter(found[3], width * int(found[4] or 1)))
    return tuple(result)


def _statements(body: str, line: int) -> list[tuple[str, int]]:
    """Return labels (with their colon) and instructions, without directives, and their lines."""
    lines = (line.strip() for line in body.splitlines())
    kept = ("" if one.startswith((".loc", ".file", ".pragma")) else one for one in lines)
    result = []
    for chunk in "\n".join(kept).split(";"):
        text = chunk
        while True:
            left = text.lstrip("{} \n\t")  # scopes; an instruction starts with a letter or @
            line += text[: len(text) - len(left)].count("\n")
            label = _LABEL.match(left)
            if label is None:
                break
            result.append((label[0], line))
            text = left[label.end() :]
        if left.strip() and not left.startswith("."):
            result.append((left.strip(), line))
        line += left.count("\n")
    return result


def _instruction(text: str) -> Instruction:
    guard = ""
    if found := _GUARDED.match(text):
        guard, text = found[1], found[2]
    opcode, _, rest = text.partition(" ") if " " in text else text.partition("\t")
    opcode, tab, more = opcode.partition("\t")
    rest = more + (" " if tab else "") + rest
    operands = split(rest.replace("\n", " ").strip())
    base = opcode.split(".")[0]
    label = operands[0] if base == "bra" else ""
    ends = not guard and base in ("bra", "ret", "exit", "trap")
    return Instruction(opcode, operands, guard, label, ends)


def _renamed(text: str) -> str:
    """Give registers of inner scopes, whose names have no %, names as other registers have."""
    declared = re.findall(r"\.reg\s+\.(\w+)\s+([A-Za-z_][\w\s,]*?)\s*;", text)
    for kind, name in {(kind, name) for kind, names in declared for name in split(names)}:
        prefix = "%p_" if kind == "pred" else "%r_"
        text = re.sub(rf"(?<![\w%$.:]){name}\b", prefix + name, text)
    return text


def _body(text: str, start: int) -> str:
    """Return the text up to the brace that closes the one before ``start``."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : start + brace.start()]
    raise ValueError("text: a kernel has no closing brace")


def parse(text: str) -> dict[str, Kernel]:
    """Return the kernels of a PTX file by name.

    Raises:
        ValueError: If it contains none.
    """
    shared = {name: int(size or 0) for _, name, size in _SHARED.findall(text)}
    kernels = {}
    text = _renamed(re.sub(r"//.*", "", text))
    for entry in _ENTRY.finditer(text):
        name, parameters = entry[1], entry[2]
        body = _body(text, entry.end())
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        repeated: dict[str, str] = {}
        first = text.count("\n", 0, entry.end()) + 1
        for statement, line in _statements(body, first):
            if statement.endswith(":"):
                label = statement[:-1]
                if label in labels:  # of an inner scope
                    repeated[label] = f"{label}#{len(instructions)}"
                labels[repeated.get(label, label)] = len(instructions)
            else:
                instruction = _instruction(statement)
                label = repeated.get(instruction.label, instruction.label)
                instructions.append(dataclasses.replace(instruction, label=label, line=line))
        code = Code(tuple(instructions), labels)
        kernels[name] = Kernel(name, _parameters(parameters), shared, code)
    if not kernels:
        raise ValueError("text: got no kernel, expected PTX with an .entry")
    return kernels
