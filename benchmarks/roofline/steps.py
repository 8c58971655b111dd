"""Loops of a kernel with the number of their iterations: machine code matched with executed PTX.

The assembler keeps the order of loops but may unroll them. A loop of the machine code belongs to
the loop of the PTX whose accesses to global memory, barriers and matrix instructions it contains
once, or several times if it is unrolled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.roofline import ptx
from benchmarks.roofline.code import Block, Loop
from benchmarks.roofline.reading import Region, read, structure
from benchmarks.roofline.traces import Trace


@dataclass(frozen=True)
class Step:
    """A loop, or the code outside of all loops.

    Attributes:
        region: Its machine instructions, without those of inner loops.
        iterations: Iterations in one program, over all entries; 1 outside of loops.
        instructions: Positions in the PTX of its instructions, without those of inner loops.
        buffers: Buffers that its asynchronous copies fill in advance; 0 without such copies.
        distance: Instructions between a load to registers and the first use of its result.
    """

    region: Region
    iterations: int
    instructions: frozenset[int]
    buffers: int
    distance: float = 0.0


@dataclass(frozen=True)
class _Node:
    loop: Loop
    region: Region
    positions: frozenset[int]
    header: int
    inner: list[_Node]


def _positions(graph: Sequence[Block], numbers: Sequence[int]) -> frozenset[int]:
    return frozenset(at for k in numbers for at in range(graph[k].start, graph[k].stop))


def _tree(graph: Sequence[Block], tree: Sequence[Loop], regions: Sequence[Region]) -> list[_Node]:
    return [
        _Node(
            loop,
            region,
            _positions(graph, loop.own_blocks()),
            graph[loop.header].start,
            _tree(graph, loop.inner, region.inner),
        )
        for loop, region in zip(tree, regions, strict=True)
    ]


def _signature(region: Region) -> tuple[int, ...]:
    accesses = (sum(c.values()) for c in (region.loads, region.stores, region.copies))
    return (*accesses, region.bulk, region.atomics, len(region.inner))


def _factor(inner: Region, outer: Region) -> int | None:
    """Return how often a loop of the machine code contains the body of a loop of the PTX."""
    a, b = _signature(inner)[:-1], _signature(outer)[:-1]
    counts = [(x, y) for x, y in zip(a, b, strict=True) if x or y]
    if len(inner.inner) != len(outer.inner):
        return None
    if not counts:
        return 1
    if any(x == 0 for x, _ in counts):
        return None
    factors = {y / x for x, y in counts}
    factor = factors.pop()
    return int(factor) if not factors and factor >= 1 and factor == int(factor) else None


@dataclass(frozen=True)
class _Pair:
    region: Region
    node: _Node
    factor: int
    remainder: int  # 0, or by how much the loop before it is unrolled, whose remainder this is

    def iterations(self, trace: Trace) -> int:
        whole = trace.iterations(self.node.header)
        return whole % self.remainder if self.remainder else whole // self.factor


def _match(found: Sequence[_Node], regions: Sequence[Region]) -> list[_Pair]:
    """Pair the loops of the machine code with those of the PTX, in order.

    Raises:
        ValueError: If a loop of the machine code has no counterpart.
    """
    if len(found) == len(regions):
        return [
            _Pair(region, node, _factor(node.region, region) or 1, 0)
            for node, region in zip(found, regions, strict=True)
        ]
    pairs: list[_Pair] = []
    at = 0
    for number, region in enumerate(regions):
        last = pairs[-1] if pairs else None
        more = len(regions) - number > len(found) - at
        if last and more and last.factor > 1 and _factor(last.node.region, region) == 1:
            pairs.append(_Pair(region, last.node, 1, last.factor))
            continue
        for k in range(at, len(found)):
            factor = _factor(found[k].region, region)
            if factor is not None:
                pairs.append(_Pair(region, found[k], factor, 0))
                at = k + 1
                break
        else:
            raise ValueError(
                f"a loop of {region.instructions} instructions has no counterpart in the PTX"
            )
    return pairs


def _buffers(kernel: ptx.Kernel, node: _Node, outside: frozenset[int]) -> int:
    """Return the groups of copies started before a loop for each group started in it."""
    instructions = kernel.code.instructions

    def groups(positions: Sequence[int]) -> int:
        return sum(instructions[at].opcode.startswith("cp.async.commit") for at in positions)

    inside = groups(sorted(node.positions))
    if not inside:
        return 0
    before = []
    for at in range(node.header - 1, -1, -1):
        if at not in outside:
            break
        before.append(at)
    return groups(before) // inside


def steps(kernel: ptx.Kernel, region: Region, trace: Trace) -> list[Step]:
    """Return the code outside of loops and all loops of a kernel.

    Args:
        kernel: The PTX.
        region: What the machine code contains.
        trace: Execution of one program of the PTX.

    Raises:
        ValueError: If a loop of the machine code has no counterpart in the PTX.
    """
    graph, tree, _ = structure(kernel.code)
    inside = frozenset().union(*(loop.blocks for loop in tree))
    straight = _positions(graph, [k for k in range(len(graph)) if k not in inside])
    result = [Step(region, 1, straight, 0)]

    def visit(nodes: list[_Node], regions: list[Region], around: frozenset[int]) -> None:
        for pair in _match(nodes, regions):
            node = pair.node
            copies = _buffers(kernel, node, around)
            result.append(Step(pair.region, pair.iterations(trace), node.positions, copies))
            visit(node.inner, pair.region.inner, node.positions)

    visit(_tree(graph, tree, read(kernel.code).inner), region.inner, straight)
    return result
