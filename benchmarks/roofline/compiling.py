"""Compilation of a recorded launch for a GPU, and what the compiler reports."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.roofline import amdgcn, launches, ptx, reading, sass
from benchmarks.roofline.code import Code
from benchmarks.roofline.launches import Launch
from benchmarks.roofline.targets import Target


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        name: Name of the kernel.
        target: What it was compiled for.
        registers: Registers per thread.
        stack: Bytes of stack per thread.
        spills: Bytes per thread that are spilled (NVIDIA), or spilled vector registers (AMD).
        shared: Bytes of shared memory.
        threads: Threads of a program.
        region: Counts of its instructions by loop.
        kernel: Its parsed PTX; None for AMD.
        assembly: Its PTX, or its AMD assembly.
        code: Its machine code, if that names the lines of the PTX; else None.
    """

    name: str
    target: Target
    registers: int
    stack: int
    spills: int
    shared: int
    threads: int
    region: reading.Region
    kernel: ptx.Kernel | None
    assembly: str
    code: Code | None = None


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile a launch for a target."""
    import triton

    source, options = launches.source(launch, target)
    built = triton.compile(source, target=launches.gpu(target), options=options)
    threads = built.metadata.num_warps * target.warp_size
    shared = built.metadata.shared
    if target.backend == "hip":
        text = built.asm["amdgcn"]
        used = amdgcn.resources(text)
        region = reading.read(amdgcn.parse(text))
        return Compiled(
            launch.name,
            target,
            **used,
            shared=shared,
            threads=threads,
            region=region,
            kernel=None,
            assembly=text,
        )
    cubin = built.asm["cubin"]
    ((name, text),) = sass.disassemble(cubin).items()
    used = sass.resources(cubin)[name]
    region = reading.read(sass.parse(text))
    return Compiled(
        launch.name,
        target,
        used["REG"],
        used["STACK"],
        reading.total(region, "local"),
        shared,
        threads,
        region,
        ptx.parse(built.asm["ptx"])[name],
        built.asm["ptx"],
    )
