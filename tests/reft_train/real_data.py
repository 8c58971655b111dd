"""Small real files of the benchmarks, kept outside the repository: ``REFT_DATA``, or
``shared/data`` beside it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def data_folder() -> Path:
    """The folder that holds ``<set>/{train,test}.json``, whether it exists or not."""
    given = os.environ.get("REFT_DATA")
    return Path(given) if given else Path(__file__).resolve().parents[2].parent / "shared" / "data"


def needs(*names: str) -> pytest.MarkDecorator:
    """Skip a test unless all these files are there, such as "boolq/test.json"; the reason names
    those that are not.
    """
    absent = [str(data_folder() / name) for name in names if not (data_folder() / name).is_file()]
    return pytest.mark.skipif(bool(absent), reason=f"no {', '.join(absent)}")
