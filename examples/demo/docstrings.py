"""A task on text that every machine has: which standard-library package is a docstring from?"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from reft_train.errors import wrong

PACKAGES = ("asyncio", "email", "idlelib", "importlib", "multiprocessing", "unittest", "xml")
NAMES = re.compile(rf"\b(?:{'|'.join(PACKAGES)})\b", re.IGNORECASE)
WORDS = 30  # of a text
PER_MODULE = (30, 6)  # texts of a module for training, and held out
Texts = list[tuple[str, str]]


def docstrings(train: int, test: int, root: Path | None = None) -> tuple[Texts, Texts]:
    """Return training and test pairs of text and package, as many of each package.

    Names of packages in the texts are replaced. Modules are held out as a whole, and a text that
    occurs twice is used once. A package with too little text, or not installed, is left out.

    Args:
        train, test: pairs of each package.
        root: folder of the standard library; None: this Python's.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    draw, seen = random.Random(0), set()
    parts: tuple[Texts, Texts] = ([], [])
    for package in PACKAGES:
        files = sorted((root / package).rglob("*.py"))
        draw.shuffle(files)
        own: tuple[Texts, Texts] = ([], [])
        for path in files:
            texts = [text for text in dict.fromkeys(_texts(path, root)) if text not in seen]
            seen.update(texts)
            held_out = len(own[1]) < test  # held-out modules come first
            own[held_out].extend((text, package) for text in texts[: PER_MODULE[held_out]])
        if len(own[0]) >= train and len(own[1]) >= test:
            parts[0].extend(own[0][:train])
            parts[1].extend(own[1][:test])
    if len({label for _, label in parts[0]}) < 2:
        what = f"{root} with too few docstrings"
        raise wrong("standard library", what, f"two packages with {train + test} each")
    return parts


def _texts(path: Path, root: Path) -> Iterator[str]:
    if {"test", "tests", "idle_test"} & set(path.relative_to(root).parts):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some sources have invalid escapes
        tree = ast.parse(path.read_bytes())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        words = (ast.get_docstring(node) or "").split() if isinstance(node, kinds) else []
        if len(words) > 5:  # short texts carry too little information
            yield NAMES.sub("package", " ".join(words[:WORDS]))


def conversation(text: str, package: str, packages: Sequence[str]) -> list[dict[str, str]]:
    """Return a pair as messages; the last one is the answer."""
    question = f"Which Python package is the text from: {', '.join(packages)}?"
    said = (("system", question), ("user", text), ("assistant", package))
    return [{"role": role, "content": content} for role, content in said]


def named(answer: str) -> str | None:
    """Return the package that an answer names first, or None."""
    found = NAMES.search(answer)
    return found and found[0].lower()
