"""docs/serving.md: its command line is accepted, its blocks run against a server, its bytes are right."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.pages import DOCS, python_blocks, run_page

PAGE = DOCS / "serving.md"


@pytest.fixture
def named_folders(site):
    """The folders that the page names, in the adapter root."""
    from tests.serving.vllm.http_models import save_adapter

    for seed, name in enumerate(("german", "german2", "polite", "short"), 300):
        save_adapter(site.model, site.root / name, seed)
    yield
    loaded = {one["name"] for one in site.adapters() if one["named"]}
    for name in loaded & {"german", "polite", "short"}:
        site.post("/reft/unload", name=name)


def test_every_block_runs(site, named_folders):
    for name in ("german", "polite"):
        site.post("/reft/load", name=name)
    blocks = python_blocks(PAGE)
    assert len(blocks) >= 3 and sum("assert" in source for _, source in blocks) >= 3
    run_page(PAGE, {"__name__": "serving_page", "URL": site.server.url})


def test_the_command_line_is_accepted(site, named_folders, tmp_path, monkeypatch):
    from reft_kernels.serving.vllm.serve import prepared

    (tmp_path / "model").symlink_to(site.model)
    (tmp_path / "adapters").symlink_to(site.root)
    monkeypatch.chdir(tmp_path)
    (console,) = re.findall(
        r"^```console\n\$ (.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    words = shlex.split(console.replace("\\\n", " "))
    assert words[0] == "reft-serve"
    command, variables = prepared(words[1:])
    assert command[3:5] == ["--model", "model"] and "german2" not in variables["REFT_KERNELS_SERVE"]


def test_bytes_of_an_adapter(site):
    (listed,) = [one for one in site.adapters() if one["name"] == "a"]
    layers, rank, width = len(listed["layers"]), listed["rank"], 64
    assert listed["bytes"] == 4 * layers * rank * (2 * width + 1)
    text = PAGE.read_text()
    for layers, width in ((32, 4096), (80, 8192)):
        for rank in (4, 8, 16, 32):
            assert f" {4 * layers * rank * (2 * width + 1) / 1e6:.1f} MB" in text
