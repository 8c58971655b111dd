"""README.md and pages of the documentation: their Python blocks run, and import public names alone."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from tests.pages import DOCS, python_blocks, run_page

README = DOCS.parent / "README.md"
RUN = [README, *(DOCS / f"{name}.md" for name in ("quickstart", "examples", "methods"))]
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
_ANY_PYTHON = re.compile(r"^```py(?:thon)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert python_blocks(page)
    run_page(page, {"__name__": f"{page.stem}_page"})


def test_the_readme_trains_an_adapter_that_loads(tmp_path, monkeypatch, capsys):
    import torch

    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "readme_page"}
    run_page(README, names)
    losses = [float(number) for number in re.findall(r"loss ([0-9.]+)", capsys.readouterr().out)]
    assert losses[-1] < losses[0]
    assert {path.name for path in Path("adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    inputs = {"input_ids": names["input_ids"][:, :12]}
    assert torch.equal(names["loaded"](**inputs).logits, names["model"].eval()(**inputs).logits)


def _imports(source: str) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(name.name, None) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", name.name) for name in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] == "reft_kernels"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS.parent).as_posix())
def test_pages_import_public_names(page):
    for source in _ANY_PYTHON.findall(page.read_text(encoding="utf-8")):
        for module, name in _imports(source):
            assert not any(part.startswith("_") for part in [*module.split("."), name or ""]), (
                f"{module}: {name}"
            )
            try:
                found = importlib.import_module(module)
            except ImportError:  # of a package that is not installed here
                assert importlib.util.find_spec(module) is not None
                continue
            assert name is None or hasattr(found, name), f"{module} has no {name}"
            assert name is None or name in getattr(found, "__all__", [name]), (
                f"{module}.{name} is not in __all__"
            )


_DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)


@pytest.mark.parametrize("page", sorted((DOCS / "api").glob("*.md")), ids=lambda page: page.stem)
def test_the_reference_shows_public_names(page):
    for target in _DIRECTIVE.findall(page.read_text(encoding="utf-8")):
        assert not any(part.startswith("_") for part in target.split("."))


def test_the_reference_shows_every_name_of_the_package():
    import reft_kernels as rk

    shown = {
        name
        for page in (DOCS / "api").glob("*.md")
        for name in _DIRECTIVE.findall(page.read_text(encoding="utf-8"))
    }
    assert {f"reft_kernels.{name}" for name in rk.__all__} - shown == {"reft_kernels.__version__"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS.parent).as_posix())
def test_links_lead_to_files(page):
    for target in _LINK.findall(_FENCED.sub("", page.read_text(encoding="utf-8"))):
        known = target in (
            "changelog.md",
            "contributing.md",
            "security.md",
        )  # docs/hooks.py makes them
        assert known or (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    navigation = (
        (DOCS.parent / "mkdocs.yml")
        .read_text(encoding="utf-8")
        .partition("\nnav:")[2]
        .partition("\nvalidation:")[0]
    )
    listed = set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE))
    assert pages <= listed and listed - pages == {"changelog.md", "contributing.md", "security.md"}
