"""Packaging: two packages in two places, a module that PyTorch loads and the native libraries;
metadata is in pyproject.toml.

REFT_KERNELS_BUILD_NATIVE=0 installs without a compiler. REFT_KERNELS_BUILD_CUDA=1 adds the CUDA
library, =0 leaves it out; unset, it is built where nvcc is found.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))  # an isolated build does not have the project on its path

import build as native  # noqa: E402


def _switch(name: str, default: bool) -> bool:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: got {value!r}, expected 0 or 1")
    return value == "1" if value else default


NATIVE = _switch("REFT_KERNELS_BUILD_NATIVE", True)
CUDA = NATIVE and _switch("REFT_KERNELS_BUILD_CUDA", native.nvcc() is not None)


class BuildNative(build_ext):
    """Libraries that PyTorch loads, not Python modules: no Python version in their names."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, extension: Extension) -> None:
        library = Path(self.get_ext_fullpath(extension.name))
        build = native.build_cuda if extension.name.endswith("cuda") else native.build_cpu
        try:
            build(library.parent, Path(self.build_temp) / library.stem)
        except native.BuildError as error:
            raise SystemExit(f"reft_kernels: {error}") from None


class Wheel(bdist_wheel):
    """One wheel for every Python 3: the libraries hold no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


names = ["reft_kernels._native_cpu"] * NATIVE + ["reft_kernels._native_cuda"] * CUDA
setup(
    packages=find_packages(include=["reft_kernels", "reft_kernels.*"]) + find_packages("python"),
    package_dir={"reft_train": "python/reft_train"},
    # beside the metadata that a build leaves here: torch must find it wherever it finds its entry
    # point
    py_modules=["reft_kernels_autoload"],
    ext_modules=[Extension(name, sources=[]) for name in names],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    # what an isolated build needs beside setuptools: nothing more where nothing native is built
    setup_requires=["torch>=2.11", "ninja"] if NATIVE else [],
)
