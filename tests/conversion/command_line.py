"""Helpers to run the conversion command in this process."""

from __future__ import annotations

from reft_kernels import convert as command


def run(*arguments) -> int:
    return command.main([str(a) for a in arguments])


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}


def refused(capsys, tmp_path, expected: str, *arguments) -> None:
    """Check that the command fails with exit code 2 and writes nothing.

    The error is one line that contains ``expected``.
    """
    before = sorted(p.name for p in tmp_path.iterdir())
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert expected in captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == before
