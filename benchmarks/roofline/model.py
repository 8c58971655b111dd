"""The model of time. Its results are ESTIMATES; no GPU is involved.

The time of a launch is the launch itself plus the largest of

- bytes moved to and from HBM / bandwidth of HBM,
- bytes moved between L2 and the multiprocessors / bandwidth of L2,
- warp instructions / issue slots of the multiprocessors,
- the chain of dependent steps of the programs of one multiprocessor, wave after wave;

the first three after the code outside of loops of one program, which moves few bytes.

A step of a loop takes the issue of its instructions, of all warps that share a scheduler, plus its
barriers, plus the latency of one load from the level that serves it. A loop with k > 1 buffers in
flight overlaps the latency with k - 1 steps; where the machine code is matched by line
(``csrc/cuda``), the instructions between a load and the first use of its result overlap it, too. A
transfer between the blocks of a cluster takes a latency of its own. Loads of one step overlap each
other. What one program reads again comes from HBM if the programs that run at the same time touch
more than L2 holds; the weights, which all programs read, stay in L2. Hits in L1 are not counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.roofline import native_steps
from benchmarks.roofline.compiling import Compiled
from benchmarks.roofline.launches import AnyLaunch
from benchmarks.roofline.steps import Step, steps
from benchmarks.roofline.traces import SECTOR, Access, Trace


@dataclass(frozen=True)
class Device:
    """Assumptions about a GPU."""

    name: str
    processors: int
    clock: float  # Hz
    hbm: float  # bytes/s that a copy reaches
    l2: float  # bytes/s
    l2_size: float  # bytes
    launch: float  # s
    issue: int  # warp instructions that a multiprocessor starts per clock
    hbm_latency: float  # clocks
    l2_latency: float  # clocks
    barrier: float  # clocks
    spacing: float  # clocks between dependent instructions of one warp, on average
    registers: int  # of a multiprocessor
    shared: int  # bytes of shared memory of a multiprocessor
    warps: int  # resident warps of a multiprocessor
    blocks: int  # resident programs of a multiprocessor
    partitions: tuple[int, ...]  # multiprocessors of each part within which a cluster stays
    exchange: float  # clocks of a transfer between blocks of a cluster, or of their barrier


H200 = Device(
    name="H200",
    processors=132,
    clock=1.98e9,
    hbm=4.3e12,
    l2=5.5e12,
    l2_size=50e6,
    launch=2e-6,
    issue=4,
    hbm_latency=700,
    l2_latency=270,
    barrier=20,
    spacing=2,
    registers=65536,
    shared=228 * 1024,
    warps=64,
    blocks=32,
    partitions=(18, 18, 16, 16, 16, 16, 16, 16),
    exchange=250,
)


@dataclass(frozen=True)
class Estimate:
    """ESTIMATE of one launch.

    Attributes:
        kernel: Name of the kernel.
        programs: Number of programs.
        registers: Registers per thread.
        hbm_bytes, l2_bytes: Bytes moved, from the compiled code.
        weight_bytes: The part of ``l2_bytes`` that all programs read.
        instructions: Warp instructions.
        iterations: Iterations of loops of one program.
        barriers: Barriers that one program executes.
        hbm, l2, issue, chain: The four times in s.
        seconds: Estimated time in s.
    """

    kernel: str
    programs: int
    registers: int
    hbm_bytes: float
    l2_bytes: float
    weight_bytes: float
    instructions: float
    iterations: int
    barriers: int
    hbm: float
    l2: float
    issue: float
    chain: float
    seconds: float

    @property
    def limit(self) -> str:
        """What bounds the time."""
        times = {"HBM": self.hbm, "L2": self.l2, "issue": self.issue, "steps": self.chain}
        return max(times, key=lambda name: times[name])


def fitting(registers: int, threads: int, shared: int, device: Device) -> int:
    """Return the programs that fit onto a multiprocessor at the same time.

    Args:
        registers: Registers of a thread.
        threads: Threads of a program.
        shared: Bytes of shared memory of a program.
        device: Assumptions.
    """
    warps = -(-threads // 32)
    # registers are allocated to a warp in units of 256
    per_warp = -(-registers * 32 // 256) * 256
    fits = (
        device.registers // (per_warp * warps),
        device.warps // warps,
        device.shared // (shared + 1024),
        device.blocks,
    )
    return max(1, min(fits))


def resident_clusters(each: int, size: int, device: Device) -> int:
    """Return the clusters of ``size`` blocks that fit onto the GPU at the same time.

    Args:
        each: Blocks that fit onto a multiprocessor.
        size: Blocks of a cluster.
        device: Assumptions.
    """
    return sum(part * each // size for part in device.partitions)


def resident(compiled: Compiled, device: Device) -> int:
    """Return the programs of a kernel that fit onto a multiprocessor at the same time."""
    return fitting(compiled.registers, compiled.threads, compiled.shared, device)


@dataclass
class _Traffic:
    hbm: float = 0.0
    l2: float = 0.0
    weights: float = 0.0


def _groups(trace: Trace) -> dict[tuple[str, bool], list[Access]]:
    groups: dict[tuple[str, bool], list[Access]] = defaultdict(list)
    for access in trace.accesses.values():
        groups[access.buffer, access.kind == "store"].append(access)
    return groups


def _shared_buffers(traces: Sequence[Trace]) -> set[str]:
    """Return the buffers of which all executed programs read the same part."""
    read: list[dict[str, set[int]]] = []
    for trace in traces:
        of_program: dict[str, set[int]] = defaultdict(set)
        for access in trace.accesses.values():
            if access.kind != "store":
                of_program[access.buffer] |= access.touched
        read.append(of_program)
    return {name for name in read[0] if all(other.get(name) == read[0][name] for other in read[1:])}


def _traffic(
    launch: AnyLaunch, trace: Trace, shared: set[str], at_once: int, device: Device
) -> _Traffic:
    """Return the bytes of all programs, taking one as typical."""
    total = _Traffic()
    programs = launch.programs
    sizes = launch.sizes
    own = 0
    again: dict[str, float] = {}
    for (name, stores), accesses in _groups(trace).items():
        touched = len(set().union(*(access.touched for access in accesses))) * SECTOR
        moved = sum(access.sectors for access in accesses) * SECTOR
        total.l2 += moved * programs
        total.hbm += min(touched * programs, max(sizes.get(name, 0), SECTOR))
        if name in shared and not stores and programs > 1:
            total.weights += moved * programs
        elif not stores:
            again[name] = (moved - touched) * programs
            own += touched
    if own * min(programs, at_once) > device.l2_size:
        # Only buffers that are themselves too large for L2 are read from HBM again
        total.hbm += sum(b for name, b in again.items() if sizes.get(name, 0) > device.l2_size)
    return total


def _latency(step: Step, trace: Trace, shared: set[str], spilled: bool, device: Device) -> float:
    """Return the latency of the loads of a step in clocks."""
    loads = [
        (at, access)
        for at, access in trace.accesses.items()
        if at in step.instructions and access.kind in ("load", "copy", "atomic")
    ]
    if not loads:
        return 0.0
    for at, access in loads:
        earlier: set[int] = set()
        for before, other in trace.accesses.items():
            if before < at and before not in step.instructions and other.buffer == access.buffer:
                earlier |= other.touched
        if access.buffer not in shared and (spilled or not access.touched <= earlier):
            return device.hbm_latency
    return device.l2_latency


def _steps(compiled: Compiled, trace: Trace) -> list[Step]:
    """Return the steps of one program."""
    assert compiled.kernel is not None
    if compiled.code is not None:
        return native_steps.steps(compiled.code, compiled.kernel, trace)
    return steps(compiled.kernel, compiled.region, trace)


def _clocks(
    found: Sequence[Step], trace: Trace, shared: set[str], spilled: bool, share: float, device
) -> float:
    """Return the clocks of one program, whose steps follow each other."""
    clocks = 0.0
    for step in found:
        region = step.region
        busy = region.instructions * share + region.barriers * device.barrier
        busy += region.exchanges * (device.exchange - device.barrier)
        latency = _latency(step, trace, shared, spilled, device) if step.iterations else 0.0
        latency = max(0.0, latency - step.distance * share)
        ahead = step.buffers - 1
        clocks += step.iterations * (max(busy, latency / ahead) if ahead > 0 else busy + latency)
    return clocks


def estimate(
    launch: AnyLaunch,
    compiled: Compiled,
    traces: Sequence[Trace],
    last: Trace | None = None,
    device: Device = H200,
) -> Estimate:
    """Estimate the time of a launch.

    Args:
        launch: The launch.
        compiled: Its kernel.
        traces: Executions of a first, a middle and a last program.
        last: Execution of the program that adds up the sums of others, if there is one.
        device: Assumptions.

    Raises:
        ValueError: If the kernel was compiled for AMD, or if its loops are not understood.
    """
    if compiled.kernel is None:
        raise ValueError(f"compiled: got {compiled.target.name}, expected an NVIDIA target")
    typical = traces[len(traces) // 2]
    shared = _shared_buffers(traces)
    slots = resident(compiled, device)
    programs = launch.programs
    per_processor = -(-programs // device.processors)
    together = min(per_processor, slots)
    waves = -(-per_processor // slots)
    warps = -(-compiled.threads // 32)
    traffic = _traffic(launch, typical, shared, slots * device.processors, device)
    spilled = traffic.hbm > sum(_unique(launch, typical).values())
    found = _steps(compiled, typical)
    instructions = sum(step.region.instructions * step.iterations for step in found) * warps
    share = max(device.spacing, together * warps / device.issue)
    clocks = waves * _clocks(found, typical, shared, spilled, share, device)
    if last is not None:
        # The sums of the others are added after their last step, by one program on each processor
        final = _steps(compiled, last)
        few = max(device.spacing, warps / device.issue)
        clocks += _clocks(final, last, shared, False, few, device)
        clocks -= _clocks(found, typical, shared, False, few, device)
        traffic.l2 += (_moved(last) - _moved(typical)) * programs / launch.grid[1]
    hbm = traffic.hbm / device.hbm
    l2 = traffic.l2 / device.l2
    issue = instructions * per_processor / (device.issue * device.clock)
    chain = clocks / device.clock
    ramp = 0.0
    if len(found) > 1:
        ramp = _clocks(found[:1], typical, shared, spilled, share, device) / device.clock
    return Estimate(
        compiled.name,
        programs,
        compiled.registers,
        traffic.hbm,
        traffic.l2,
        traffic.weights,
        instructions * programs,
        sum(step.iterations for step in found[1:]),
        round(sum(step.region.barriers * step.iterations for step in found)),
        hbm,
        l2,
        issue,
        chain,
        device.launch + max(ramp + max(hbm, l2, issue), chain),
    )


def _moved(trace: Trace) -> float:
    return sum(access.sectors for access in trace.accesses.values()) * SECTOR


def _unique(launch: AnyLaunch, trace: Trace) -> dict[tuple[str, bool], float]:
    """Return the bytes of each buffer that all programs touch, each counted once."""
    sizes = launch.sizes
    result = {}
    for key, accesses in _groups(trace).items():
        touched = len(set().union(*(access.touched for access in accesses))) * SECTOR
        result[key] = min(touched * launch.programs, max(sizes.get(key[0], 0), SECTOR))
    return result


def clone_seconds(size: float, device: Device = H200) -> float:
    """Return the ESTIMATE of ``torch.clone`` of a tensor of ``size`` bytes in s."""
    return device.launch + 2 * size / device.hbm
