"""Labelled texts: a user's file, or standard library docstrings labelled by package."""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

from reft_train.data.reading import read_rows
from reft_train.errors import UserError
from reft_train.tasks.base import Task
from reft_train.tasks.fields import answer, filled, optional

PACKAGES = ("asyncio", "email", "idlelib", "importlib", "multiprocessing", "unittest", "xml")


@dataclass(frozen=True)
class Data(Task):
    """Training and held-out pairs of (text, class number)."""

    train: list[tuple[str, int]]
    held_out: list[tuple[str, int]]
    labels: list[str]
    name = "demo"


def _split(rows: list[tuple[str, str, str]], name: str) -> Data:
    """Hold out about a quarter of each label by whole groups; rows are (text, label, group)."""
    from sklearn.model_selection import StratifiedGroupKFold

    unique: dict[str, dict[str, tuple[str, str, str]]] = {}
    for row in rows:
        unique.setdefault(row[0].casefold(), {}).setdefault(row[1], row)
    # drops duplicates, and texts that occur under two labels
    kept = [row for labelled in unique.values() if len(labelled) == 1 for row in labelled.values()]
    texts, names, groups = ([row[place] for row in kept] for place in range(3))
    labels = sorted(set(names))
    if len(labels) < 2 or min(map(names.count, labels)) < 4:
        raise UserError(
            f"--data: got {name} with {len(labels)} labels, expected at least 2, each of 4 texts"
        )
    parts = next(StratifiedGroupKFold(4, shuffle=True, random_state=0).split(texts, names, groups))
    return Data(*([(texts[i], labels.index(names[i])) for i in part] for part in parts), labels)


def load_file(path: Path) -> Data:
    """Load rows of ``text`` and ``label``, or ``instruction``, ``input`` and ``answer``."""
    rows = []
    for number, row in enumerate(read_rows(path, "--data")):
        known = ("text", "label") if "text" in row.fields else ("instruction", "input", "answer")
        more = [optional(row, name, known) for name in known[1:-1]]
        text = "\n".join(filter(None, [filled(row, known[0], known), *more]))
        rows.append((text.strip(), answer(row, known[-1], known), str(number)))
    return _split(rows, str(path))


def load_docstrings(root: Path | None = None) -> Data:
    """Load docstrings by parsing the standard library; modules are held out as a whole."""
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    names = re.compile(rf"\b(?:{'|'.join(PACKAGES)})\b", re.IGNORECASE)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    rows = []
    for path in (path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))):
        parts = path.relative_to(root).parts
        if {"test", "tests", "idle_test"} & set(parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some sources have invalid escapes
            nodes = [
                node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, kinds)
            ]
        texts = [" ".join((ast.get_docstring(node) or "").split()) for node in nodes]
        # short texts carry too little information
        texts = [text for text in texts if text.count(" ") > 3][:150]
        # removes the label from the text
        rows += [(names.sub("package", text), parts[0], "/".join(parts)) for text in texts]
    return _split(rows, f"the standard library in {root}")
