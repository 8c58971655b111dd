"""Build csrc/cuda for the CPU with ninja, against the emulation in this folder.

    python tests/cuda/emulation/build.py [--arch 800|900]

The library replaces ``_native_cuda.so`` if ``REFT_KERNELS_CUDA_LIBRARY`` names it, and supports CPU
tensors. The programs need no PyTorch. Sanitizers instrument the kernels, not the emulation.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
KERNELS = ROOT / "csrc" / "cuda"
MACHINE = ("machine", "waits", "runtime", "fiber", "tensor")
ARCHITECTURES = (800, 900)
_spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc" / "build.py")
native = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native)

_FLAGS = "-std=c++17 -g -fPIC -fvisibility=hidden -fno-omit-frame-pointer"
# without warnings: unknown pragmas of nvcc, and variables that some instantiations do not use
_KERNEL_FLAGS = "-w -fno-strict-aliasing -ffp-contract=fast -march=native -x c++"
_SANITIZERS = {
    "": "-O1 -fsanitize=alignment -fsanitize-undefined-trap-on-error",
    # gcc 12 compiles valid_rows() of project.cuh wrongly under -fsanitize=bounds
    "address": "-O1 -fsanitize=address,undefined -fno-sanitize=bounds -fno-sanitize-recover=undefined",
    "thread": "-O1 -fsanitize=thread",
}
_RULES = [
    "rule compile",
    "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
    "  depfile = $out.d",
    "  deps = gcc",
    "rule link",
    "  command = $cxx $flags $in -o $out $libraries",
]


def _rules(
    target: Path, objects: Path, arch: int, kernels: list[Path], sanitizer: str, torch: Path | None
) -> list[str]:
    """Return the ninja rules of a library or program.

    ``kernels`` are the sources compiled against the emulated CUDA headers.
    """
    includes = " ".join(
        f"-I{native._escape(folder)}" for folder in (HERE / "include", HERE, KERNELS)
    )
    common = f"{_FLAGS} -DREFT_EMULATED_ARCH={arch} {includes}"
    checked = _SANITIZERS[sanitizer]
    define = f" -DREFT_EMULATION_{sanitizer[0].upper()}SAN" if sanitizer else ""
    lines = [f"cxx = {native.compiler()}", *_RULES]
    built = []

    def add(source: Path, flags: str) -> None:
        built.append(native._escape(objects / f"{source.stem}-{source.parent.name}.o"))
        lines.extend(
            [f"build {built[-1]}: compile {native._escape(source)}", f"  flags = {common} {flags}"]
        )

    for source in kernels:
        add(source, f"{checked} {_KERNEL_FLAGS} -D__CUDA_ARCH__={arch}")
    for name in MACHINE:
        add(HERE / f"{name}.cpp", f"-O2 -Wall -Wextra{define}")
    libraries = ""
    if torch is not None:
        flags = f"-O1 -DTORCH_TARGET_VERSION={native.TARGET_TORCH} -DREFT_CUDA_EMULATED"
        for source in (KERNELS / "registration.cpp", HERE / "registration.cpp"):
            add(source, f"{flags} -isystem {native._escape(torch / 'include')}")
        libraries = f"-shared -L{native._escape(torch / 'lib')} -ltorch_cpu"
    linked = checked if sanitizer else ""
    lines.append(f"build {native._escape(target)}: link {' '.join(built)}")
    return [*lines, f"  flags = {linked}", f"  libraries = {libraries}"]


def _locked(target: Path, rules: list[str], objects: Path) -> Path:
    objects.mkdir(parents=True, exist_ok=True)
    with open(objects / "lock", "w") as lock:  # several test processes may build at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        return native._build(target, rules, objects, "the emulation is needed by tests alone")


def build_library(arch: int, folder: Path = ROOT / "build" / "emulation") -> Path:
    """Build the operator library of the emulated kernels, for compute capability ``arch / 100``.

    Raises:
        native.BuildError: If ninja, a C++17 compiler or PyTorch's headers are missing, or if a
            compilation fails.
    """
    objects = folder / f"library-{arch}"
    target = objects / f"_emulated_cuda_{arch}.so"
    kernels = sorted(KERNELS.glob("*.cu"))
    return _locked(
        target, _rules(target, objects, arch, kernels, "", native.torch_folder()), objects
    )


def build_program(source: Path, arch: int, sanitizer: str, folder: Path, *, kernels: bool) -> Path:
    """Build a program from ``source`` and the emulation.

    Args:
        source: Source with the main function.
        arch: Compute capability times 100.
        sanitizer: "", "address" or "thread".
        folder: Folder of the build.
        kernels: Include the kernels of csrc/cuda.

    Raises:
        native.BuildError: If ninja or a C++17 compiler is missing, or if a compilation fails.
    """
    objects = folder / f"{source.stem}-{arch}-{sanitizer or 'plain'}"
    target = objects / source.stem
    sources = [source, *(sorted(KERNELS.glob("*.cu")) if kernels else [])]
    return _locked(target, _rules(target, objects, arch, sources, sanitizer, None), objects)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the emulated CUDA library.")
    parser.add_argument(
        "--arch", type=int, choices=ARCHITECTURES, default=900, help="compute capability, times 100"
    )
    print(build_library(parser.parse_args().arch))
