"""The files at the top of the repository agree with one another."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from reft_kernels.version import __version__
from tests.packaging.test_constraints import PROJECT, PYTHONS

ROOT = Path(__file__).resolve().parents[2]


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_licence_is_the_one_that_the_metadata_names():
    text = _read("LICENSE")
    assert (
        PROJECT["license"] == "Apache-2.0"
        and "Apache License\n" in text
        and "END OF TERMS AND CONDITIONS" in text
    )
    assert PROJECT["license-files"] == ["LICENSE"]


def test_one_version():
    releases = re.findall(r"^## \[(.+?)\]", _read("CHANGELOG.md"), re.MULTILINE)
    assert releases[0] == __version__
    assert str(yaml.safe_load(_read("CITATION.cff"))["version"]) == __version__


def test_type_information_is_packaged():
    assert (ROOT / "reft_kernels" / "py.typed").is_file() and (
        ROOT / "python" / "reft_train" / "py.typed"
    ).is_file()


def test_the_workflow_tests_each_python():
    jobs = yaml.safe_load(_read(".github/workflows/ci.yml"))["jobs"]
    assert jobs["tests"]["strategy"]["matrix"]["python-version"] == PYTHONS
    targets = set(re.findall(r"^([a-z][\w-]*):", _read("Makefile"), re.MULTILINE))
    run = {
        step["run"].split()[1] for job in jobs.values() for step in job["steps"] if "run" in step
    }
    assert run <= targets and {"lint", "test", "docs"} <= run


def test_forms_are_yaml():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert path.name == "config.yml" or {"name", "description", "body"} <= set(form)
    assert yaml.safe_load(_read(".pre-commit-config.yaml"))["repos"]
