"""constraints.txt has one version of every package for every Python that pyproject.toml names."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = [
    found[1]
    for line in PROJECT["classifiers"]
    if (found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line))
]
FILES = [
    "constraints.txt",
    *sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "benchmarks").glob("requirements-*.txt")
    ),
]
# releases that need a later Python than 3.10, of packages that have a pin for it
REFUSE_310 = {
    "numpy": "2.3",
    "scipy": "1.16",
    "pandas": "3",
    "scikit-learn": "1.8",
    "matplotlib": "3.11",
    "transformers": "5.21",
}


def _requirements(name: str) -> list[Requirement]:
    lines = (
        line.split("#")[0].strip()
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    )
    return [Requirement(line) for line in lines if line]


def _applies(one: Requirement, python: str) -> bool:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
    }
    return one.marker is None or one.marker.evaluate(environment)


def _applying(requirements: list[Requirement], python: str) -> dict[str, list[str]]:
    """The versions whose marker applies, by package."""
    found: dict[str, list[str]] = {}
    for one in requirements:
        if _applies(one, python):
            found.setdefault(canonicalize_name(one.name), []).append(str(one.specifier))
    return found


def _wanted(python: str) -> set[str]:
    """Every package that the project and its extras ask for directly on this Python."""
    lines = list(PROJECT["dependencies"])
    for name, extra in PROJECT["optional-dependencies"].items():
        if name != "vllm":  # pins torch and transformers itself: benchmarks/requirements-vllm.txt
            lines += extra
    names = {
        canonicalize_name(one.name) for one in map(Requirement, lines) if _applies(one, python)
    }
    return names - {canonicalize_name(PROJECT["name"])} | {"setuptools"}


def test_the_claimed_versions_are_those_of_the_project():
    assert PYTHONS == ["3.10", "3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", FILES)
def test_one_exact_version_for_each_python(name, python):
    requirements = _requirements(name)
    found = _applying(requirements, python)
    missing = {canonicalize_name(one.name) for one in requirements} - set(found)
    assert missing <= _wanted(PYTHONS[0]) - _wanted(python), (
        "packages without a version for this Python, which it needs"
    )
    for package, versions in found.items():
        # torch's own wheel fixes triton's version where it brings CUDA, so there the last version allowed is the pin
        (version,) = (
            versions[0].split(",")
            if package != "triton"
            else [v for v in versions[0].split(",") if v[0] == "<"]
        )
        assert len(versions) == 1 and re.fullmatch(r"[=<]=[0-9][0-9a-z.]*", version), (
            f"{package}: {versions}"
        )


@pytest.mark.parametrize("python", PYTHONS)
def test_every_direct_dependency_is_pinned(python):
    assert not _wanted(python) - set(_applying(_requirements("constraints.txt"), python))


def test_python_310_gets_releases_that_support_it():
    found = _applying(_requirements("constraints.txt"), "3.10")
    for package, first_refusing in REFUSE_310.items():
        version = found[package][0].removeprefix("==")
        assert [int(n) for n in version.split(".")] < [int(n) for n in first_refusing.split(".")], (
            f"{package} {version}"
        )


def test_the_oldest_supported_transformers_replaces_every_pin():
    """As the Makefile does it for .venv-transformers4."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for pattern, with_what in re.findall(r"s/(\^\w+==\.\*)/([\w.=]+)/", makefile):
        text, count = re.subn(pattern, with_what, text, flags=re.MULTILINE)
        assert count, pattern
    assert set(re.findall(r"^transformers.*$", text, re.MULTILINE)) == {"transformers==4.57.6"}
