"""Tests of building and installing the native CPU library.

They cover wheels, build options, missing tools and builds with sanitizers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from reft_kernels import cpu, host_calls

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "csrc" / "build.py"


def _run(
    *command: str | Path, cwd: Path = ROOT, **environment: str | None
) -> subprocess.CompletedProcess:
    env = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=env
    )


def _copy(tmp_path: Path) -> Path:
    """Copy the project's sources, without build outputs, and return the folder of the copy."""
    target = tmp_path / "project"
    target.mkdir()
    for name in (
        "setup.py",
        "reft_kernels_autoload.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
    ):
        shutil.copy(ROOT / name, target)
    for name in ("csrc", "reft_kernels", "python"):
        shutil.copytree(
            ROOT / name,
            target / name,
            ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "build"),
        )
    return target


def _wheel(
    project: Path, out: Path, **environment: str | None
) -> tuple[subprocess.CompletedProcess, list[Path]]:
    done = _run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        out,
        project,
        cwd=project,
        **environment,
    )
    return done, sorted(out.glob("*.whl")) if out.exists() else []


CLEAN = """
import sys
import torch, reft_kernels as rk
from reft_kernels import cpu, host_calls

rk.set_backend("cpu")
hidden, X, W, b = torch.zeros(3, 8), torch.randn(8, 2), torch.randn(2, 8), torch.ones(2)
rows = rk.positions.from_indices(torch.tensor([[1]]), 3)
R = rk.householder(X)
edited = rk.loreft(hidden, R, W, b, rows=rows)
torch.testing.assert_close(edited[1], b @ R)
assert not edited[0].any() and not edited[2].any()
print(rk.__file__, cpu.LIBRARY)
"""


def _clean_environment(folder: Path) -> Path:
    """Create a virtual environment without this project's packages.

    The other installed packages, such as torch, are linked into it.

    Returns:
        The path of its Python interpreter.
    """
    done = _run(sys.executable, "-m", "venv", "--without-pip", folder)
    assert done.returncode == 0, done.stderr
    python = folder / "bin" / "python"
    site = Path(
        _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    )
    own = {"reft_kernels", "reft_train", "reft_kernels_autoload.py"}
    for place in {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}:
        for entry in place.iterdir():
            another = (
                not entry.name.startswith(("reft_kernels-", "__editable__"))
                and entry.suffix != ".pth"
            )
            if another and entry.name not in own:
                (site / entry.name).symlink_to(entry)
    return python


@pytest.fixture(scope="module")
def made_wheel(tmp_path_factory) -> Path:
    """The wheel of ``make wheel``, without CUDA."""
    folder = tmp_path_factory.mktemp("wheel")
    project = _copy(folder)
    recipe = re.search(
        r"^wheel:.*\n\t(.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    command = recipe[1].replace("$(BIN)/python", sys.executable).split()
    built = _run(*command, cwd=project, REFT_KERNELS_BUILD_CUDA="0")
    assert built.returncode == 0, (built.stdout + built.stderr)[-3000:]
    (wheel,) = (project / "dist").glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_installs_without_a_compiler(made_wheel, tmp_path):
    """Install what ``make wheel`` built, without a compiler in ``PATH``, and apply one edit."""
    python = _clean_environment(tmp_path / "clean")
    bare = {
        "PATH": str(python.parent),
        "CXX": "no-such-compiler",
        "PYTHONPATH": None,
        "REFT_KERNELS_BACKEND": None,
    }
    before = _run(python, "-c", "import reft_kernels", cwd=tmp_path, **bare)
    assert before.returncode != 0 and "ModuleNotFoundError" in before.stderr
    installed = _run(
        python, "-m", "pip", "install", "--no-index", "--no-deps", made_wheel, cwd=tmp_path, **bare
    )
    assert installed.returncode == 0, installed.stderr[-3000:]
    ran = _run(python, "-c", CLEAN, cwd=tmp_path, **bare)
    assert ran.returncode == 0, ran.stderr[-3000:]
    module, library = (Path(part) for part in ran.stdout.split())
    assert module.is_relative_to(tmp_path / "clean") and library == module.parent / "_native_cpu.so"
    command = _run(python.parent / "reft-train", "--help", cwd=tmp_path, **bare)
    assert command.returncode == 0 and "compare" in command.stdout, command.stderr


@pytest.mark.slow
def test_one_wheel_for_every_python_holds_the_library_and_both_packages(made_wheel, tmp_path):
    assert made_wheel.name.startswith("reft_kernels-") and "-py3-none-linux_" in made_wheel.name
    names = zipfile.ZipFile(made_wheel).namelist()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "reft_kernels").rglob("*.py")}
    modules |= {
        p.relative_to(ROOT / "python").as_posix()
        for p in (ROOT / "python" / "reft_train").rglob("*.py")
    }
    kept = {name for name in names if ".dist-info/" not in name}
    typed = {f"{package}/py.typed" for package in ("reft_kernels", "reft_train")}
    data = {"reft_kernels/_native_cpu.so", f"reft_kernels/{host_calls.file_name()}"}
    assert kept == modules | typed | data | {"reft_kernels_autoload.py"}
    (license,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
    assert zipfile.ZipFile(made_wheel).read(license) == (ROOT / "LICENSE").read_bytes()
    # the unpacked wheel works in a process that cannot import this checkout
    zipfile.ZipFile(made_wheel).extractall(tmp_path / "site")
    use = "import torch, reft_kernels as rk; from reft_kernels import cpu; rk.set_backend('cpu')\n"
    use += "print(cpu.LIBRARY, rk.red(torch.ones(1, 2), torch.ones(2), torch.ones(2)).tolist())"
    ran = _run(sys.executable, "-P", "-c", use, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert (
        ran.stdout.strip()
        == f"{tmp_path / 'site' / 'reft_kernels' / '_native_cpu.so'} [[2.0, 2.0]]"
    ), ran.stderr


def test_where_the_host_library_does_not_build_the_others_are_installed(tmp_path):
    compiler = tmp_path / "old-compiler"  # makes empty files, and does not know C++20
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *c++20*) echo "unknown c++20" >&2; exit 1;; esac\n'
        'while [ "$1" != -o ]; do shift; done; : > "$2"\n'
    )
    compiler.chmod(0o755)
    options = {"REFT_KERNELS_BUILD_CUDA": "0", "CXX": str(compiler)}
    project = _copy(tmp_path)
    done, wheels = _wheel(project, tmp_path / "wheels", **options)
    assert done.returncode == 0, done.stderr[-3000:]
    names = zipfile.ZipFile(wheels[0]).namelist()
    assert "reft_kernels/_native_cpu.so" in names and not any("_native_host" in n for n in names)
    options["REFT_KERNELS_BUILD_HOST"] = "1"
    done, _ = _wheel(project, tmp_path / "none", **options)
    assert done.returncode != 0 and "REFT_KERNELS_BUILD_HOST=0" in done.stdout + done.stderr


def test_without_the_native_backend_no_compiler_is_asked_for(tmp_path):
    done, wheels = _wheel(
        _copy(tmp_path), tmp_path / "wheels", REFT_KERNELS_BUILD_NATIVE="0", CXX="no-such-compiler"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert wheels[0].name.endswith("-py3-none-any.whl")
    zipfile.ZipFile(wheels[0]).extractall(tmp_path / "site")
    use = (
        "import torch, reft_kernels as rk; rk.red(torch.ones(1, 2), torch.ones(2), torch.ones(2))\n"
    )
    use += "rk.householder(torch.ones(4, 2))"
    ran = _run(
        sys.executable,
        "-P",
        "-c",
        use,
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path / "site"),
        REFT_KERNELS_BACKEND=None,
    )
    assert ran.returncode == 0, ran.stderr
    assert (
        ran.stderr.count(
            "backend 'cpu' is off (the native library was not built: install with a C++17 compiler"
        )
        == 1
    )
    assert "'torch' serves instead" in ran.stderr


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {"CXX": "no-such-compiler"},
            "C++17 compiler: found none of no-such-compiler; install g++ or clang++ or set CXX",
        ),
        ({"CXX": "false"}, "the native build failed in"),
    ],
)
def test_a_failed_build_says_what_is_missing_and_how_to_go_on(tmp_path, environment, said):
    done = _run(
        sys.executable, BUILD, "--out", tmp_path, "--objects", tmp_path / "objects", **environment
    )
    assert done.returncode == 1 and said in done.stderr
    assert "or install without the native backend: REFT_KERNELS_BUILD_NATIVE=0" in done.stderr
    assert not list(tmp_path.glob("*.so"))


def test_a_switch_that_is_no_switch_is_refused(tmp_path):
    done = _run(
        sys.executable,
        "setup.py",
        "--version",
        cwd=_copy(tmp_path),
        REFT_KERNELS_BUILD_NATIVE="yes",
    )
    assert (
        done.returncode != 0
        and "REFT_KERNELS_BUILD_NATIVE: got 'yes', expected 0 or 1" in done.stderr
    )


def test_a_library_that_is_not_there_or_none_is_said(tmp_path):
    ask = (
        "import torch; from reft_kernels import cpu; print(cpu.unsupported_reason('edit', 'cpu', "
        "torch.float32))"
    )
    absent = _run(sys.executable, "-c", ask, REFT_KERNELS_CPU_LIBRARY=str(tmp_path / "none.so"))
    assert (
        "REFT_KERNELS_CPU_LIBRARY: got" in absent.stdout
        and "expected an existing file" in absent.stdout
    )
    (tmp_path / "text.so").write_text("no library")
    damaged = _run(sys.executable, "-c", ask, REFT_KERNELS_CPU_LIBRARY=str(tmp_path / "text.so"))
    assert "the native library text.so does not load into torch" in damaged.stdout


def test_the_environment_report_names_the_instruction_set():
    done = _run(
        sys.executable, "-m", "reft_kernels.env", REFT_KERNELS_BACKEND=None, TRITON_INTERPRET=None
    )
    assert done.returncode == 0, done.stderr
    assert any(
        f"cpu     able, instruction set {isa}" in done.stdout
        for isa in ("avx512bf16", "avx512", "avx2", "portable")
    )
    portable = _run(
        sys.executable,
        "-m",
        "reft_kernels.env",
        REFT_KERNELS_CPU_ISA="portable",
        REFT_KERNELS_BACKEND=None,
    )
    assert "instruction set portable" in portable.stdout


def test_an_instruction_set_that_is_none_is_refused(tmp_path):
    refused = _run(
        sys.executable, BUILD, "--isa", "mmx", "--out", tmp_path, "--objects", tmp_path / "objects"
    )
    assert refused.returncode == 1 and refused.stderr.startswith(
        "--isa: got 'mmx', expected one of "
    ), refused.stderr


SANITIZED = """
import sys
import pytest
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]]))
"""
_SELECTED = [
    *(
        f"tests/test_functional.py::{name}"
        for name in (
            "test_exact_on_each_backend",
            "test_error_budget_of_many_ranks",
            "test_rank_256",
        )
    ),
    *(f"tests/cpu/test_threads.py::{name}" for name in ("test_red", "test_orthonormal")),
    *(
        f"tests/cpu/test_large_outputs.py::{name}"
        for name in (
            "test_red_equals_red_in_place_bit_for_bit",
            "test_the_pool_from_many_threads",
            "test_selected_rows_out_of_place",
        )
    ),
]


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory) -> dict[str, str]:
    """Build the native library with sanitizers; return the environment of a process to use it."""
    compiler = os.environ.get("CXX", "g++")
    runtimes = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        found = _run(compiler, f"-print-file-name={name}").stdout.strip()
        if not os.path.isabs(found):
            pytest.skip(f"{compiler} has no {name}")
        runtimes.append(found)
    folder = tmp_path_factory.mktemp("sanitized")
    built = _run(
        sys.executable,
        BUILD,
        "--sanitize",
        "address,undefined",
        "--isa",
        cpu.instruction_set() or "portable",
        "--out",
        folder,
        "--objects",
        folder / "objects",
    )
    assert built.returncode == 0, built.stderr
    return {
        "REFT_KERNELS_CPU_LIBRARY": str(folder / "_native_cpu.so"),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python does not free all its memory at exit
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_WAIT_POLICY": "passive",
    }


def _sanitized(environment: dict[str, str], *selection: str) -> None:
    done = _run(sys.executable, "-c", SANITIZED, *selection, **environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers_find_nothing(sanitizers):
    _sanitized(sanitizers, *_SELECTED, "-k", "not torch-cpu and not triton-cpu")


@pytest.mark.slow
def test_sanitizers_find_nothing_in_mutated_calls(sanitizers):
    """Run the fuzzer with sanitizers; if it crashes, its last output line names the case."""
    fuzz = ("-m", "tests.fuzz_operators", "--backend", "cpu", "--first", "50000", "--cases", "1500")
    done = _run(sys.executable, *fuzz, **sanitizers, OMP_NUM_THREADS="1")
    assert done.returncode == 0 and "ends" in done.stdout, (done.stdout[-300:], done.stderr[:3000])


@pytest.mark.full
@pytest.mark.slow
def test_sanitizers_find_nothing_in_any_cpu_test(sanitizers):
    files = (
        "test_ops",
        "test_functional",
        "test_autograd",
        "test_parametrization",
        "test_interventions",
        "test_rows",
    )
    selection = [f"tests/{name}.py" for name in files] + ["tests/cpu/test_threads.py"]
    _sanitized(sanitizers, *selection, "-k", "not torch-cpu and not triton-cpu and not opcheck")
