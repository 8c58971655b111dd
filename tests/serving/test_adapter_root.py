"""Folders that clients may name. Needs no vLLM."""

from __future__ import annotations

import pytest

from reft_kernels.serving.vllm.adapter_root import folder_in


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root" / "good").mkdir(parents=True)
    (tmp_path / "root" / "good" / "file").write_text("x")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("x")
    return tmp_path / "root"


def test_a_folder_of_the_root(root):
    assert folder_in(root, "good") == (root / "good").resolve()


def test_a_link_within_the_root(root):
    (root / "link").symlink_to(root / "good")
    assert folder_in(root, "link") == (root / "good").resolve()


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../outside",
        "good/..",
        "/etc",
        "good/",
        "a\\b",
        ".hidden",
        "a\0b",
        "x" * 256,
        3,
    ],
)
def test_names_with_a_path_are_refused(root, name):
    with pytest.raises(ValueError, match="path: got"):
        folder_in(root, name)


def test_links_out_of_the_root_are_refused(root):
    (root / "link").symlink_to(root.parent / "outside")
    with pytest.raises(ValueError, match="a link out of the adapter root"):
        folder_in(root, "link")
    (root / "good" / "weights").symlink_to(root.parent / "outside" / "file")
    with pytest.raises(ValueError, match="weights is a link out of the adapter root"):
        folder_in(root, "good")
    (root / "self").symlink_to(root)
    with pytest.raises(ValueError, match="a link out of the adapter root"):
        folder_in(root, "self")


def test_a_folder_that_does_not_exist(root):
    with pytest.raises(FileNotFoundError):
        folder_in(root, "absent")
    with pytest.raises(FileNotFoundError):
        folder_in(root, "file")
