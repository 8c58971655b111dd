"""Build of the packages ``reft_kernels`` and ``reft_train`` and of the native libraries.

The metadata is in pyproject.toml. Three environment variables control the native libraries:

    REFT_KERNELS_BUILD_NATIVE  0 builds none, so that no compiler is needed. Default: 1.
    REFT_KERNELS_BUILD_CUDA    1 builds the CUDA library, 0 does not. Default: 1 if nvcc is found.
    REFT_KERNELS_BUILD_HOST    1 requires the host library of this Python and the torch of the
                               build, 0 does not build it. Default: it is built where that works.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))  # an isolated build does not have the project on its path

import build as native  # noqa: E402


def _switch(name: str, default: bool) -> bool:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: got {value!r}, expected 0 or 1")
    return value == "1" if value else default


NATIVE = _switch("REFT_KERNELS_BUILD_NATIVE", True)
HOST = NATIVE and _switch("REFT_KERNELS_BUILD_HOST", True)
HOST_REQUIRED = os.environ.get("REFT_KERNELS_BUILD_HOST") == "1"
CUDA = NATIVE and _switch("REFT_KERNELS_BUILD_CUDA", native.nvcc() is not None)


class BuildNative(build_ext):
    """Build libraries whose file names setuptools would not choose.

    Those that PyTorch loads do not contain a Python version; the host library's has torch's, too.
    """

    def get_ext_filename(self, fullname: str) -> str:
        *packages, name = fullname.split(".")
        library = native.host_library_name() if name == "_native_host" else f"{name}.so"
        return os.path.join(*packages, library)

    def build_extension(self, extension: Extension) -> None:
        library = Path(self.get_ext_fullpath(extension.name))
        kind = extension.name.rpartition("_native_")[2]
        build = {"cpu": native.build_cpu, "cuda": native.build_cuda, "host": native.build_host}
        try:
            build[kind](library.parent, Path(self.build_temp) / f"_native_{kind}")
        except native.BuildError as error:
            if extension.optional:  # setuptools prints it as a warning and goes on
                raise CompileError(str(error)) from None
            raise SystemExit(f"reft_kernels: {error}") from None


class Wheel(bdist_wheel):
    """Build one wheel for all versions of Python 3.

    The host library, which uses Python's C API, is left unused by other versions than its own.
    """

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


names = ["reft_kernels._native_cpu"] * NATIVE + ["reft_kernels._native_cuda"] * CUDA
names += ["reft_kernels._native_host"] * HOST
optional = set() if HOST_REQUIRED else {"reft_kernels._native_host"}  # Python serves without it
setup(
    packages=find_packages(include=["reft_kernels", "reft_kernels.*"]) + find_packages("python"),
    package_dir={"reft_train": "python/reft_train"},
    # in the project root, next to the egg-info whose entry point makes torch import the module
    py_modules=["reft_kernels_autoload"],
    ext_modules=[Extension(name, sources=[], optional=name in optional) for name in names],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    # additional requirements of an isolated build
    setup_requires=["torch>=2.11", "ninja"] if NATIVE else [],
)
