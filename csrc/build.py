"""Build the native libraries with ninja: used by setup.py, by the tests, and by hand.

    python csrc/build.py [--cuda [--arch 90]] [--out FOLDER] [--sanitize address,undefined]
        [--isa avx2] [--dry-run]
    python csrc/build.py --host [--out FOLDER]

``_native_cpu.so`` contains ``csrc/cpu``, compiled for each instruction set of the architecture.
``_native_cuda.so`` contains ``csrc/cuda`` for sm_80, sm_90 and sm_100. Both are PyTorch operator
libraries on the stable ABI of torch 2.11 and do not use the Python API, so one build works with
every Python version and every later torch.

``_native_host-cp311-torch2.13.0.so`` contains ``csrc/host`` and uses PyTorch's C++ interface and
Python's C API. It works only with the versions in its name, those of the build; Python code serves
in its place with others.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
TARGET_TORCH = "0x020b000000000000"  # torch 2.11, the oldest supported
CUDA_ARCHITECTURES = ("80", "90", "100")

# platform.machine() -> instruction set -> compiler flags; the portable set uses only the features
# that all processors of the architecture have
INSTRUCTION_SETS = {
    "x86_64": {
        "avx512bf16": "-mavx512bf16 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c",
        "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c",
        "avx2": "-mavx2 -mfma -mf16c",
        "portable": "",
    }
}
_WITHOUT = "or install without the native backend: REFT_KERNELS_BUILD_NATIVE=0"
_WITHOUT_HOST = "or install without the host library: REFT_KERNELS_BUILD_HOST=0"
_WITHOUT_CUDA = "or install without the CUDA library: REFT_KERNELS_BUILD_CUDA=0"
_CXX_FLAGS = (
    "-std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=fast -Wall -Wextra "
    "-Wno-psabi"
)
# gcc 12 reports uninitialized variables in its own intrinsics
_KERNEL_FLAGS = "-Wno-uninitialized -Wno-maybe-uninitialized"


class BuildError(RuntimeError):
    """A tool is missing or failed. The message names the tool and possible solutions."""


def compiler() -> str:
    """Return the C++ compiler: ``$CXX`` if set, else g++, c++ or clang++ on the PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for name in names:
        found = shutil.which(name.split()[0])
        if found:
            return name
    raise BuildError(
        f"C++17 compiler: found none of {', '.join(names)}; install g++ or clang++ or set CXX, "
        f"{_WITHOUT}"
    )


def ninja() -> str:
    """Return the path of ninja: next to this Python (where pip installs it) or on the PATH."""
    beside = Path(sys.executable).with_name("ninja")
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if not found:
        raise BuildError(f"ninja: not found; pip install ninja, {_WITHOUT}")
    return found


def torch_folder() -> Path:
    """Return the folder of the torch package, without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(
            f"torch: not installed beside {sys.executable}; pip install 'torch>=2.11' first, "
            f"{_WITHOUT}"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        raise BuildError(
            f"torch: {folder} has no headers of the stable ABI; torch >= 2.11 is expected, "
            f"{_WITHOUT}"
        )
    return folder


def nvcc() -> str | None:
    """Return the path of nvcc in ``$CUDA_HOME``, on the PATH or in /usr/local/cuda, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = (
        [str(Path(home) / "bin" / "nvcc")] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    )
    return next((found for found in map(shutil.which, candidates) if found), None)


def _toolkit(nvcc: str) -> Path:
    """Return the folder of the CUDA toolkit, as reported by nvcc: the nvcc on the PATH may be a
    wrapper outside of it.
    """
    plan = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
    )
    top = next(
        (line.split("TOP=", 1)[1] for line in plan.stderr.splitlines() if "TOP=" in line), None
    )
    if top is None:
        raise BuildError(
            f"nvcc: {nvcc} does not say where its toolkit is; set CUDA_HOME, {_WITHOUT_CUDA}"
        )
    return Path(top).resolve()


def _escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _cpu_rules(library: Path, objects: Path, sanitize: str | None, isa: str | None) -> list[str]:
    torch = torch_folder()
    checked = (
        f" -g -fno-omit-frame-pointer -fsanitize={sanitize} -fno-sanitize-recover=undefined"
        if sanitize
        else ""
    )
    # -O3 takes much longer to compile with sanitizers
    flags = f"{_CXX_FLAGS} {'-O1' if sanitize else '-O3'}{checked} -I{_escape(SOURCES / 'cpu')}"
    lines = [
        f"cxx = {compiler()}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        "  command = $cxx -shared $flags $in -o $out $libraries",
        "  description = link $out",
    ]
    built = []

    def add(source: str, name: str, more: str) -> None:
        target = _escape(objects / f"{name}.o")
        built.append(target)
        lines.extend(
            [
                f"build {target}: compile {_escape(SOURCES / 'cpu' / source)}",
                f"  flags = {flags} {more}",
            ]
        )

    sets = INSTRUCTION_SETS.get(platform.machine(), {"portable": ""})
    if isa is not None and isa not in sets:
        raise BuildError(f"--isa: got {isa!r}, expected one of {', '.join(sets)}")
    kept = [name for name in sets if isa in (None, name) or name == "portable"]
    for name in kept:
        add("kernels.cpp", f"kernels_{name}", f"{_KERNEL_FLAGS} {sets[name]} -DREFT_ISA={name}")
    add("isa.cpp", "isa", " ".join(f"-DREFT_HAS_{name}" for name in kept))
    add("direct.cpp", "direct", "")
    add("host_pool.cpp", "host_pool", "")
    add("scratch.cpp", "scratch", "")
    add(
        "registration.cpp",
        "registration",
        f"-DTORCH_TARGET_VERSION={TARGET_TORCH} -isystem {_escape(torch / 'include')}",
    )
    lines += [
        f"build {_escape(library)}: link {' '.join(built)}",
        f"  flags ={checked}",
        f"  libraries = -L{_escape(torch / 'lib')} -ltorch_cpu",
    ]
    return lines


def _build(
    library: Path, rules: list[str], objects: Path, without: str, dry_run: bool = False
) -> Path:
    for folder in (library.parent, objects):
        folder.mkdir(parents=True, exist_ok=True)
    (objects / "build.ninja").write_text(
        "ninja_required_version = 1.5\n" + "\n".join(rules) + "\n", encoding="utf-8"
    )
    done = subprocess.run(
        [ninja(), "-C", str(objects), *["-n"] * dry_run],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if dry_run:
        print(done.stdout)
    if done.returncode:
        raise BuildError(
            f"the native build failed in {objects}; fix the error, {without}\n{done.stdout}"
        )
    return library


def build_cpu(
    out: Path, objects: Path, sanitize: str | None = None, isa: str | None = None
) -> Path:
    """Build ``_native_cpu.so`` into ``out``; object files go to ``objects``.

    Args:
        isa: Compile only this instruction set and the portable one.

    Raises:
        BuildError: ninja, a C++17 compiler or torch's headers are missing, or a compilation failed.
    """
    library, objects = out.resolve() / "_native_cpu.so", objects.resolve()
    return _build(library, _cpu_rules(library, objects, sanitize, isa), objects, _WITHOUT)


def host_library_name() -> str:
    """Return the file name of the host library for this Python and the installed torch."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return f"_native_host-{python}-torch{metadata.version('torch').partition('+')[0]}.so"


def _host_rules(library: Path, objects: Path) -> list[str]:
    torch, python = torch_folder(), Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        raise BuildError(
            f"Python.h: not found in {python}; install Python's headers, {_WITHOUT_HOST}"
        )
    include = torch / "include"
    folders = (include, include / "torch" / "csrc" / "api" / "include", python)
    flags = " ".join(f"-isystem {_escape(folder)}" for folder in folders)
    lines = [
        f"cxx = {compiler()}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d -std=c++20 -O2 -fPIC -fvisibility=hidden -Wall -Wextra "
        f"{flags} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = $cxx -shared -o $out $in -L{_escape(torch / 'lib')} -ltorch_python "
        "-ltorch_cpu -ltorch -lc10 -ldl",
        "  description = link $out",
    ]
    built = []
    for source in sorted((SOURCES / "host").glob("*.cpp")):
        built.append(_escape(objects / f"{source.stem}.o"))
        lines.append(f"build {built[-1]}: compile {_escape(source)}")
    return [*lines, f"build {_escape(library)}: link {' '.join(built)}"]


def build_host(out: Path, objects: Path) -> Path:
    """Build the host library of this Python and torch into ``out``; objects go to ``objects``.

    Raises:
        BuildError: ninja, a C++20 compiler or the headers of torch or Python are missing, or a
            compilation failed.
    """
    library, objects = out.resolve() / host_library_name(), objects.resolve()
    return _build(library, _host_rules(library, objects), objects, _WITHOUT_HOST)


def _cuda_rules(library: Path, objects: Path, arch: str | None) -> list[str]:
    found = nvcc()
    if found is None:
        raise BuildError(
            f"nvcc: not found; install the CUDA toolkit or set CUDA_HOME, {_WITHOUT_CUDA}"
        )
    torch, home = torch_folder(), _toolkit(found)
    architectures = (arch,) if arch else CUDA_ARCHITECTURES
    targets = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in architectures)
    newest = architectures[-1]  # also as PTX, which the driver compiles for later GPUs
    targets += f" -gencode arch=compute_{newest},code=compute_{newest}"
    static = home / "lib64" / "libcudart_static.a"
    lines = [
        f"nvcc = {_escape(found)}",
        f"cxx = {compiler()}",
        "rule kernels",
        "  command = $nvcc -MMD -MF $out.d -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden "
        f"{targets} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule registration",
        "  command = $cxx -MMD -MF $out.d -std=c++17 -O2 -fPIC -fvisibility=hidden "
        f"-DTORCH_TARGET_VERSION={TARGET_TORCH} "
        f"-isystem {_escape(torch / 'include')} -isystem {_escape(home / 'include')} -c $in -o "
        "$out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = $cxx -shared -o $out $in {_escape(static)} -L{_escape(torch / 'lib')} "
        "-Wl,--no-as-needed -ltorch_cpu "
        "-Wl,--as-needed -lpthread -ldl -lrt -Wl,--exclude-libs,ALL",
        "  description = link $out",
    ]
    built = []
    for source in sorted([*(SOURCES / "cuda").glob("*.cu"), *(SOURCES / "cuda").glob("*.cpp")]):
        built.append(_escape(objects / f"{source.stem}.o"))
        lines.append(
            f"build {built[-1]}: {'kernels' if source.suffix == '.cu' else 'registration'} "
            f"{_escape(source)}"
        )
    return [*lines, f"build {_escape(library)}: link {' '.join(built)}"]


def build_cuda(out: Path, objects: Path, arch: str | None = None, dry_run: bool = False) -> Path:
    """Build ``_native_cuda.so`` into ``out``; object files go to ``objects``.

    Args:
        arch: Compile for this compute capability alone, such as ``90``.
        dry_run: Print the commands and run none.

    Raises:
        BuildError: nvcc, ninja or torch's headers are missing, or a compilation failed.
    """
    library, objects = out.resolve() / "_native_cuda.so", objects.resolve()
    rules = _cuda_rules(library, objects, arch)
    return _build(library, rules, objects, _WITHOUT_CUDA, dry_run)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the native libraries of reft_kernels.")
    parser.add_argument(
        "--out", type=Path, default=SOURCES.parent / "reft_kernels", help="folder of the libraries"
    )
    parser.add_argument(
        "--objects",
        type=Path,
        default=SOURCES.parent / "build" / "native",
        help="folder of the object files",
    )
    parser.add_argument(
        "--sanitize", help="gcc sanitizers for the CPU library, for the tests: address,undefined"
    )
    parser.add_argument(
        "--isa", help="one instruction set, to be compiled beside the portable one; none: all"
    )
    parser.add_argument("--cuda", action="store_true", help="build the CUDA library instead")
    parser.add_argument("--host", action="store_true", help="build the host library instead")
    parser.add_argument("--arch", help="one compute capability of a GPU, such as 90; none: all")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands of the CUDA build, run none"
    )
    args = parser.parse_args(argv)
    try:
        if args.cuda:
            print(build_cuda(args.out, args.objects / "cuda", args.arch, args.dry_run))
        elif args.host:
            print(build_host(args.out, args.objects / "host"))
        else:
            print(
                build_cpu(
                    args.out,
                    args.objects / (args.sanitize or "release").replace(",", "-"),
                    args.sanitize,
                    args.isa,
                )
            )
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
