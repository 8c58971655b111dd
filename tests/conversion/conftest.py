"""Fixtures: the folder of a trained adapter in each format."""

from __future__ import annotations

import pytest

from tests.conversion import folders
from tests.conversion.command_line import run


@pytest.fixture
def peft(tmp_path):
    folders.peft_folder(tmp_path / "peft")
    return tmp_path / "peft"


@pytest.fixture
def pyreft(tmp_path, peft):
    assert run(peft, tmp_path / "pyreft", "--to", "pyreft") == 0
    return tmp_path / "pyreft"


@pytest.fixture
def hub(tmp_path):
    folders.hub_folder(tmp_path / "hub")
    return tmp_path / "hub"
