"""Packaging: two packages in two places; metadata stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["reft_kernels", "reft_kernels.*"]) + find_packages("python"),
    package_dir={"reft_train": "python/reft_train"},
)
