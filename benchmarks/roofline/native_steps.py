"""Loops of a kernel of ``csrc/cuda`` with the number of their iterations.

The machine code names the line of the PTX that each instruction comes from, and an execution of
the PTX counts how often each line is executed. An instruction counts in a loop as often as an
iteration executes it: code of other dtypes or activations, which a launch never reaches, counts
nothing.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from benchmarks.roofline import ptx
from benchmarks.roofline.code import Block, Code, Instruction, Loop
from benchmarks.roofline.reading import Region, structure
from benchmarks.roofline.steps import Step
from benchmarks.roofline.traces import Trace

# Instructions that the assembler neither moves between loops nor merges
_FIXED = ("LDG", "STG", "LDGSTS", "STS", "BAR", "HMMA", "LD", "ST", "LDS")
_REGISTER = re.compile(r"\bR(\d+)\b")
_WIDTHS = {"64": 2, "128": 4, "256": 8}


class _Lines:
    """How often the instructions of the PTX are executed, by line."""

    def __init__(self, kernel: ptx.Kernel, trace: Trace) -> None:
        self.counts: Counter[int] = Counter()
        self.positions: defaultdict[int, list[int]] = defaultdict(list)
        for at, instruction in enumerate(kernel.code.instructions):
            executed = trace.counts[at] / trace.warps
            self.counts[instruction.line] = max(self.counts[instruction.line], executed)
            self.positions[instruction.line].append(at)


def _inside(code: Code, graph: Sequence[Block], numbers: Sequence[int]) -> list[Instruction]:
    return [code.instructions[at] for k in numbers for at in range(graph[k].start, graph[k].stop)]


def _iterations(
    own: Sequence[Instruction], lines: _Lines, copies: Counter[int]
) -> tuple[float, int]:
    """Return how often a loop is executed, and by how much the assembler has unrolled it.

    Args:
        own: Its instructions without those of inner loops.
        lines: Executions of the PTX.
        copies: In how many places of the whole kernel each line is.
    """
    here = Counter(i.line for i in own if i.opcode.split(".")[0] in _FIXED)
    found = []
    for line, count in here.items():
        executed = lines.counts[line]
        if copies[line] == count:
            found.append((executed / count, count))
        elif count > 1:  # unrolled; the remainder is in another loop
            found.append((executed // count, count))
        else:
            others = copies[line] - 1
            found.append((executed % others if others > 1 else executed / copies[line], 1))
    if found:
        return max(found, key=lambda pair: pair[0])
    return max((lines.counts[i.line] for i in own if i.label), default=0.0), 1


def _weights(
    own: Sequence[Instruction], iterations: float, unrolled: int, lines: _Lines
) -> list[float]:
    """Return how often an iteration executes each instruction, at most once.

    One instruction of the PTX may be several of the machine code.
    """
    if not iterations:
        return [0.0] * len(own)
    return [min(1.0, lines.counts[i.line] / (iterations * unrolled)) for i in own]


def _distance(own: Sequence[Instruction], weights: Sequence[float]) -> float:
    """Return the instructions between a load of global memory and the first use of its result.

    It is the smallest such number of a loop, whose last instruction is followed by its first.
    """
    first: dict[int, float] = {}  # register -> distance to its next use, from the end backwards
    at, smallest = 0.0, float("inf")
    places = list(enumerate(own))
    for round_ in (1, 0):  # a second time for uses in the next iteration
        for k, instruction in reversed(places):
            at -= weights[k]
            if not weights[k]:
                continue
            parts = instruction.opcode.split(".")
            registers = [int(n) for o in instruction.operands for n in _REGISTER.findall(o)]
            stores = parts[0].startswith(("ST", "RED", "BAR", "BRA"))
            if parts[0] == "LDG" and registers and round_ == 0:
                wide = next((_WIDTHS[p] for p in parts if p in _WIDTHS), 1)
                uses = [first[r] for r in range(registers[0], registers[0] + wide) if r in first]
                if uses:
                    smallest = min(smallest, min(uses) - at)
            sources = registers if stores else registers[1:]
            if not stores and registers and registers[0] not in sources:
                first.pop(registers[0], None)
            for register in sources:
                first[register] = at
    return 0.0 if smallest == float("inf") else max(0.0, smallest - 1)


def _region(own: Sequence[Instruction], weights: Sequence[float]) -> Region:
    """Return the counts of one iteration."""
    region = Region()
    for instruction, weight in zip(own, weights, strict=True):
        if weight:
            one = Region()
            one.add(instruction)
            for field in dataclasses.fields(Region):
                value = getattr(one, field.name)
                if isinstance(value, int):
                    setattr(region, field.name, getattr(region, field.name) + value * weight)
                elif isinstance(value, Counter):
                    for width, count in value.items():
                        getattr(region, field.name)[width] += count * weight
    return region


def steps(code: Code, kernel: ptx.Kernel, trace: Trace) -> list[Step]:
    """Return the code outside of loops and all loops that a block executes.

    Args:
        code: The machine code, with lines of the PTX.
        kernel: The PTX.
        trace: Execution of one block of the PTX.
    """
    graph, tree, waiting = structure(code)
    lines = _Lines(kernel, trace)
    waits = {id(i) for i in _inside(code, graph, sorted(waiting)) if "TRYWAIT" in i.opcode}
    copies = Counter(i.line for i in code.instructions if id(i) not in waits)
    result = []

    def positions(own: Sequence[Instruction], weights: Sequence[float]) -> frozenset[int]:
        return frozenset(
            at for i, w in zip(own, weights, strict=True) if w for at in lines.positions[i.line]
        )

    def add(numbers: Sequence[int], loop: Loop | None, before: Sequence[int]) -> None:
        own = [i for i in _inside(code, graph, numbers) if id(i) not in waits]
        iterations, unrolled = _iterations(own, lines, copies) if loop else (1.0, 1)
        weights = _weights(own, iterations, unrolled, lines)
        if not any(weights):
            return
        buffers = 0
        groups = sum(i.opcode == "LDGDEPBAR" for i in own)
        if groups:
            ahead = _inside(code, graph, before)
            buffers = sum(i.opcode == "LDGDEPBAR" for i in ahead) // groups
        distance = _distance(own, weights) if loop else 0.0
        result.append(
            Step(
                _region(own, weights),
                max(1, round(iterations)),
                positions(own, weights),
                buffers,
                distance,
            )
        )

    def visit(loops: Sequence[Loop], around: Sequence[int]) -> None:
        for loop in loops:
            header = graph[loop.header].start
            before = [k for k in around if graph[k].start < header]
            add(loop.own_blocks(), loop, before)
            visit(loop.inner, loop.own_blocks())

    inside = frozenset().union(*(loop.blocks for loop in tree))
    straight = [k for k in range(len(graph)) if k not in inside]
    add(straight, None, ())
    visit(tree, straight)
    return result
