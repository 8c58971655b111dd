"""Make installed packages absent for the processes of a rehearsal.

:func:`folder` makes a folder that, first in ``PYTHONPATH``, hides packages from Python processes:
``import`` raises ``ModuleNotFoundError`` and ``importlib.util.find_spec`` returns None.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# what a machine with a GPU may lack, although the tests of a developer have it
PACKAGES = (
    *("optuna", "datasets", "pyvene", "pyreft", "rich", "matplotlib", "tensorboard"),
    *("sklearn", "importlinter", "grimp", "trl", "lm_eval", "bitsandbytes"),
)
_SITE = '''"""Hide packages."""

import importlib.machinery
import sys

ABSENT = frozenset({names!r})


class Finder(importlib.machinery.PathFinder):
    """Find every module but the absent ones."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0] in ABSENT:
            return None
        return super().find_spec(fullname, path, target)


sys.meta_path[:] = [
    Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path
]
'''


def folder(parent: Path, names: Sequence[str] = PACKAGES) -> Path:
    """Write the folder and return it."""
    made = parent / "absent_packages"
    made.mkdir(parents=True, exist_ok=True)
    (made / "sitecustomize.py").write_text(_SITE.format(names=tuple(names)))
    return made
