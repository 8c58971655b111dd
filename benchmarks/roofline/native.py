"""The CUDA C++ kernels of ``csrc/cuda``: compiled by nvcc for one GPU and read as machine code.

Cubins are kept in the build folder, named by the hash of the sources and of the compiler.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.roofline import reading, sass

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "cubins"
_NAME = re.compile(r"\d+([a-z][a-z_]*_kernel)(I\w+?E)?E")
_DTYPES = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32"}


@dataclass(frozen=True)
class NativeKernel:
    """One instance of a kernel template.

    Attributes:
        source: Name of the source file.
        name: Name of the template.
        types: Its type arguments, such as ``("bf16", "fp32")``.
        numbers: Its integer and boolean arguments.
        registers: Registers per thread.
        stack: Bytes of stack per thread.
        region: Counts of its instructions by loop.
    """

    source: str
    name: str
    types: tuple[str, ...]
    numbers: tuple[int, ...]
    registers: int
    stack: int
    region: reading.Region

    def __str__(self) -> str:
        arguments = ", ".join((*self.types, *map(str, self.numbers)))
        return f"{self.name}<{arguments}>"


def nvcc() -> str | None:
    """Return the path of nvcc, or None."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc" / "build.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{ROOT / 'csrc' / 'build.py'}: not found")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.nvcc()


def cubin(source: Path, arch: str = "sm_90", folder: Path = CACHE) -> bytes:
    """Return a source compiled for an architecture; compiled only if the sources changed.

    Raises:
        FileNotFoundError: If there is no nvcc.
        RuntimeError: If nvcc fails.
    """
    compiler = nvcc()
    if compiler is None:
        raise FileNotFoundError("nvcc: not found; install the CUDA toolkit or set CUDA_HOME")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + arch.encode())
    for file in (source, *sorted(source.parent.glob("*.cuh")), *sorted(source.parent.glob("*.h"))):
        digest.update(file.read_bytes())
    kept = folder / f"{source.stem}-{arch}-{digest.hexdigest()[:16]}.cubin"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        command = [compiler, "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-o", str(partial)]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc failed for {source.name}: {done.stderr[-4000:]}")
        partial.replace(kept)
    return kept.read_bytes()


def _arguments(text: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the type and number arguments in a mangled template argument list."""
    kinds: list[str] = []
    numbers: list[int] = []
    # S<n>_ repeats an earlier type
    for found in re.finditer(r"13__nv_bfloat16|6__half|S\w*?_|L[a-z](n?\d+)E|[a-z]", text):
        if found[1] is not None:
            numbers.append(int(found[1].replace("n", "-")))
        elif found[0].startswith("S"):
            kinds.append(kinds[0] if kinds else "?")
        elif found[0] in _DTYPES:
            kinds.append(_DTYPES[found[0]])
    return tuple(kinds), tuple(numbers)


def kernels(source: Path, arch: str = "sm_90", folder: Path = CACHE) -> list[NativeKernel]:
    """Return all kernels of a source.

    Raises:
        FileNotFoundError: If there is no nvcc.
        RuntimeError: If nvcc fails.
        ValueError: If a kernel's name is not understood.
    """
    code = cubin(source, arch, folder)
    used = sass.resources(code)
    result = []
    for mangled, text in sass.disassemble(code).items():
        found = _NAME.search(mangled)
        if found is None:
            raise ValueError(f"kernel: got {mangled}, expected a name that ends in _kernel")
        types, numbers = _arguments((found[2] or "I")[1:])
        result.append(
            NativeKernel(
                source.stem,
                found[1],
                types,
                numbers,
                used[mangled]["REG"],
                used[mangled]["STACK"],
                reading.read(sass.parse(text)),
            )
        )
    return sorted(result, key=str)


HEAD = ("kernel", "registers", "stack", "spilled", "loads", "stores", "barriers a loop")


def lines(found: list[NativeKernel]) -> list[tuple[str, ...]]:
    """Return the cells of a table of kernels: widths in bytes per thread with their counts."""

    def widths(kernel: NativeKernel, name: str) -> str:
        counts: dict[int, int] = {}
        for region in (kernel.region, *reading.walk(kernel.region)):
            for width, count in getattr(region, name).items():
                counts[width] = counts.get(width, 0) + count
        return " ".join(f"{width}Bx{count}" for width, count in sorted(counts.items()))

    return [
        (
            str(kernel),
            str(kernel.registers),
            str(kernel.stack),
            str(reading.total(kernel.region, "local")),
            widths(kernel, "loads"),
            widths(kernel, "stores"),
            str(max((loop.barriers for loop in reading.walk(kernel.region)), default=0)),
        )
        for kernel in found
    ]
