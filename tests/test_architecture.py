"""The layers of ARCHITECTURE.md hold: the contracts of import-linter in pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _lint(folder: Path, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    return subprocess.run(
        [*command, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False, **kwargs
    )


def _environment(path: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{path / 'python'}"}


def test_imports_follow_the_arrow():
    done = _lint(ROOT, env=_environment(ROOT))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"Contracts: \d+ kept, 0 broken", done.stdout)


def test_an_import_against_the_arrow_is_found(tmp_path):
    """An import under TYPE_CHECKING from a lower layer to a higher one breaks a contract."""
    for name in ("reft_kernels", "python", "benchmarks"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "results", "*.pyc")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    lower = tmp_path / "reft_kernels" / "dtypes.py"
    lower.write_text(
        lower.read_text()
        + "\nfrom typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n"
        + "    from reft_kernels.model.editor import Editor\n"
    )
    done = _lint(tmp_path, env=_environment(tmp_path))
    assert done.returncode != 0 and "Layers of the engine BROKEN" in done.stdout


def test_every_package_is_described():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    packages = {p.parent.name for p in (ROOT / "reft_kernels").glob("*/__init__.py")}
    assert {name for name in packages if name not in text} == set()
