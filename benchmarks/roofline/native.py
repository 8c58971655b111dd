"""The CUDA C++ kernels of ``csrc/cuda``: compiled by nvcc for one GPU and read as machine code.

What nvcc made is kept in the build folder, named by the hash of the sources and of the compiler.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from benchmarks.roofline import ptx, reading, sass
from benchmarks.roofline.code import Code

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "cubins"
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
    "-Xptxas",
    "-lineinfo",  # of the PTX; the machine code stays the same
)
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


@dataclass(frozen=True)
class Built:
    """A source compiled for one architecture.

    Attributes:
        ptx: Its PTX.
        cubin: Its machine code, which names the line of the PTX of each instruction.
        host: Object file with its host code.
    """

    ptx: Path
    cubin: Path
    host: Path


@functools.cache
def builder() -> ModuleType:
    """Return ``csrc/build.py`` as a module."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc" / "build.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{ROOT / 'csrc' / 'build.py'}: not found")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvcc() -> str | None:
    """Return the path of nvcc, or None."""
    return builder().nvcc()


@functools.cache
def _compiler() -> tuple[str, bytes]:
    """Return the path and the version of nvcc."""
    path = nvcc()
    if path is None:
        raise FileNotFoundError("nvcc: not found; install the CUDA toolkit or set CUDA_HOME")
    return path, subprocess.run([path, "--version"], capture_output=True, check=True).stdout


def build(source: Path, arch: str = "sm_90", folder: Path = CACHE) -> Built:
    """Return a source compiled for an architecture; compiled only if the sources changed.

    Raises:
        FileNotFoundError: If there is no nvcc.
        RuntimeError: If nvcc fails.
    """
    compiler, version = _compiler()
    digest = hashlib.sha256(version + arch.encode() + " ".join(_FLAGS).encode())
    for file in (source, *sorted(source.parent.glob("*.cuh")), *sorted(source.parent.glob("*.h"))):
        digest.update(file.read_bytes())
    kept = folder / f"{source.stem}-{arch}-{digest.hexdigest()[:16]}"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            work, whole = Path(temporary, "work"), Path(temporary, "whole")
            work.mkdir()
            whole.mkdir()
            command = [compiler, *_FLAGS, f"-arch={arch}", "--keep", "--keep-dir", str(work)]
            command += ["-c", str(source), "-o", str(whole / "host.o")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"nvcc failed for {source.name}: {done.stderr[-4000:]}")
            shutil.copy(next(work.glob("*.ptx")), whole / "code.ptx")
            shutil.copy(next(work.glob("*.cubin")), whole / "code.cubin")
            with contextlib.suppress(OSError):  # another process was faster
                whole.rename(kept)
    return Built(kept / "code.ptx", kept / "code.cubin", kept / "host.o")


@functools.lru_cache(maxsize=8)
def _texts(cubin: Path) -> dict[str, str]:
    return sass.disassemble(cubin.read_bytes(), lines=True)


@functools.lru_cache(maxsize=8)
def _resources(cubin: Path) -> dict[str, dict[str, int]]:
    return sass.resources(cubin.read_bytes())


@functools.lru_cache(maxsize=8)
def _virtual(file: Path) -> dict[str, ptx.Kernel]:
    return ptx.parse(file.read_text(encoding="utf-8"))


def symbols(built: Built) -> list[str]:
    """Return the names of the kernels of a build."""
    return list(_resources(built.cubin))


@functools.lru_cache(maxsize=64)
def machine_code(built: Built, mangled: str) -> tuple[Code, dict[str, int], ptx.Kernel]:
    """Return the machine code, the resources and the PTX of one kernel."""
    code = sass.parse(_texts(built.cubin)[mangled])
    return code, _resources(built.cubin)[mangled], _virtual(built.ptx)[mangled]


def identity(mangled: str) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """Return the name of a template and its type and number arguments.

    Raises:
        ValueError: If the name is not understood.
    """
    found = _NAME.search(mangled)
    if found is None:
        raise ValueError(f"kernel: got {mangled}, expected a name that ends in _kernel")
    return found[1], *_arguments((found[2] or "I")[1:])


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
    built = build(source, arch, folder)
    used = _resources(built.cubin)
    result = []
    for mangled, text in _texts(built.cubin).items():
        name, types, numbers = identity(mangled)
        result.append(
            NativeKernel(
                source.stem,
                name,
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
