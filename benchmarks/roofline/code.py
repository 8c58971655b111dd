"""Instructions, basic blocks and natural loops of a kernel, for any instruction set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: Operation with its modifiers, such as ``LDG.E.128``.
        operands: Operands as text.
        guard: Predicate that it is executed under, such as ``!P0``, or "".
        label: Target of a branch, or "".
        ends: Whether control never continues at the next instruction.
        line: Line of the PTX that it is, or comes from; 0 if that is not known.
    """

    opcode: str
    operands: tuple[str, ...]
    guard: str = ""
    label: str = ""
    ends: bool = False
    line: int = 0


@dataclass(frozen=True)
class Code:
    """Instructions of one kernel in the order of their addresses, and positions of the labels."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


@dataclass(frozen=True)
class Block:
    """A basic block: instructions ``start`` to ``stop - 1``, and the blocks that may follow."""

    start: int
    stop: int
    successors: tuple[int, ...]


@dataclass
class Loop:
    """A natural loop.

    Attributes:
        header: Its first block.
        blocks: All its blocks, those of inner loops included.
        inner: Loops directly inside.
    """

    header: int
    blocks: frozenset[int]
    inner: list[Loop] = field(default_factory=list)

    def own_blocks(self) -> list[int]:
        """Return the blocks that are in no inner loop."""
        inside = frozenset().union(*(loop.blocks for loop in self.inner))
        return sorted(self.blocks - inside)


def blocks(code: Code) -> list[Block]:
    """Return the basic blocks in the order of their addresses."""
    instructions = code.instructions
    targets = {code.labels[branch.label] for branch in instructions if branch.label}
    starts = {0, *(at for at in targets if at < len(instructions))}
    for at, instruction in enumerate(instructions):
        if (instruction.label or instruction.ends) and at + 1 < len(instructions):
            starts.add(at + 1)
    order = sorted(starts)
    number = {start: k for k, start in enumerate(order)}
    result = []
    for k, start in enumerate(order):
        stop = order[k + 1] if k + 1 < len(order) else len(instructions)
        last = instructions[stop - 1]
        after = []
        if last.label and code.labels[last.label] in number:
            after.append(number[code.labels[last.label]])
        if not last.ends and k + 1 < len(order):
            after.append(k + 1)
        result.append(Block(start, stop, tuple(dict.fromkeys(after))))
    return result


def _dominators(graph: Sequence[Block]) -> list[set[int]]:
    predecessors: list[list[int]] = [[] for _ in graph]
    for k, block in enumerate(graph):
        for after in block.successors:
            predecessors[after].append(k)
    reached = _reachable(graph)
    everything = set(reached)
    dominators = [set(everything) for _ in graph]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for k in reached[1:]:
            before = [dominators[p] for p in predecessors[k] if p in everything]
            new = {k} | (set.intersection(*before) if before else set())
            if new != dominators[k]:
                dominators[k], changed = new, True
    return dominators


def _reachable(graph: Sequence[Block]) -> list[int]:
    seen, left = {0}, [0]
    while left:
        for after in graph[left.pop()].successors:
            if after not in seen:
                seen.add(after)
                left.append(after)
    return sorted(seen)


def loops(graph: Sequence[Block]) -> list[Loop]:
    """Return the outermost natural loops in the order of their addresses, inner ones nested."""
    predecessors: list[list[int]] = [[] for _ in graph]
    for k, block in enumerate(graph):
        for after in block.successors:
            predecessors[after].append(k)
    dominators, reached = _dominators(graph), set(_reachable(graph))
    bodies: dict[int, set[int]] = {}
    for k in sorted(reached):
        for header in graph[k].successors:
            if header in dominators[k]:
                body = bodies.setdefault(header, {header})
                left = [k]
                while left:
                    member = left.pop()
                    if member not in body:
                        body.add(member)
                        left += [p for p in predecessors[member] if p in reached]
    found = [Loop(header, frozenset(body)) for header, body in sorted(bodies.items())]
    outermost = []
    for loop in found:
        around = [other for other in found if loop is not other and loop.header in other.blocks]
        if around:
            min(around, key=lambda other: len(other.blocks)).inner.append(loop)
        else:
            outermost.append(loop)
    return outermost


def nested(tree: Sequence[Loop]) -> Iterator[Loop]:
    """Yield all loops, each before the loops inside it."""
    for loop in tree:
        yield loop
        yield from nested(loop.inner)
