"""Text found on every machine: the docstrings of the standard library, each labelled with the
package it comes from.

Sources are parsed, never imported, so nothing runs and the text does not depend on what happens to
be installed. Whole
modules are held out: docstrings of one module resemble each other, and a split by row would let a
model recognise the module. The packages' names (``email``, ``asyncio``) are replaced in every text
by one neutral word, since the answer must not be written there.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import re
import sys
import sysconfig
import warnings
from collections import Counter
from pathlib import Path

from reft_train.cache_folder import default_cache
from reft_train.demo.datasets import Dataset, Example, deduplicate
from reft_train.errors import UserError
from reft_train.files import write_text

# CPython's packages with at least ten documented modules, none of which holds most of the text, in
# 3.10 to 3.13: what is learned from some of a package's modules can then tell something about the
# others. Some distributions lack idlelib.
PACKAGES = ("asyncio", "email", "idlelib", "importlib", "multiprocessing", "unittest", "xml")
MIN_WORDS = 5  # shorter ones ("Return the name.") say nothing about their package
MAX_PER_MODULE = 150  # or one module's text would outweigh its package's others
MIN_TEXTS, MIN_MODULES = 60, 4  # for a package to be a label
PARTS = 4  # that a package's modules are dealt into; one is held out
NEUTRAL = "package"
_TEST_FOLDERS = {"test", "tests", "idle_test", "__pycache__"}
_FORMAT = 1  # of the cache; part of its name, with what the text depends on


def _docstrings(source: bytes) -> list[str]:
    """Docstrings of a module, its classes and its functions, spacing made single; in the order
    of ``ast.walk``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in somebody else's source
        tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [" ".join(text.split()) for text in found if text]


def _mask(text: str, names: re.Pattern[str]) -> str:
    return names.sub(NEUTRAL, text)


def extract(root: Path, packages: tuple[str, ...] = PACKAGES) -> list[Example]:
    """Labelled docstrings of ``packages`` under ``root``, in a fixed order; ``source`` is the
    module's dotted name.
    """
    names = re.compile(r"\b(?:" + "|".join(map(re.escape, packages)) + r")\b", re.IGNORECASE)
    examples = []
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if _TEST_FOLDERS.intersection(parts):
                continue
            try:
                texts = _docstrings(path.read_bytes())
            except (
                SyntaxError,
                ValueError,
                OSError,
            ):  # a template or a damaged file: not text for us
                continue
            kept = [text for text in texts if len(text.split()) >= MIN_WORDS][:MAX_PER_MODULE]
            source = ".".join(part for part in parts if part != "__init__")
            examples += [Example(_mask(text, names), package, source) for text in kept]
    return deduplicate(examples)


def held_out_modules(examples: list[Example]) -> set[str]:
    """Modules to hold out, from each package about a quarter of its text.

    A package's modules are dealt, largest first, into four parts, each to the one that has least
    text; the part nearest to a quarter is held out. Large and small modules are thus on both sides,
    where there are enough of them.
    """
    held: set[str] = set()
    for label in sorted({example.label for example in examples}):
        sizes = Counter(example.source for example in examples if example.label == label)
        parts: list[list[str]] = [[] for _ in range(PARTS)]
        totals = [0] * PARTS
        for module in sorted(sizes, key=lambda name: (-sizes[name], name)):
            smallest = totals.index(min(totals))
            parts[smallest].append(module)
            totals[smallest] += sizes[module]
        quarter = sum(totals) / PARTS
        held.update(parts[min(range(PARTS), key=lambda i: abs(totals[i] - quarter))])
    return held


def split_by_module(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """The part to train on and the held-out part; no module is in both."""
    held = held_out_modules(examples)
    return [e for e in examples if e.source not in held], [e for e in examples if e.source in held]


def _usable(examples: list[Example]) -> list[Example]:
    """Examples of the packages that have enough texts and modules."""
    kept = []
    for label in dict.fromkeys(example.label for example in examples):
        own = [example for example in examples if example.label == label]
        if len(own) >= MIN_TEXTS and len({example.source for example in own}) >= MIN_MODULES:
            kept += own
    return kept


def _cached(path: Path) -> list[Example] | None:
    try:
        return [Example(*row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):  # absent or damaged: it is made again
        return None


def _fingerprint(root: Path) -> str:
    settings = [_FORMAT, sys.version, str(root), PACKAGES, MIN_WORDS, MAX_PER_MODULE, NEUTRAL]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def load_stdlib(cache: Path | None = None, root: Path | None = None) -> Dataset:
    """The docstrings of this interpreter's standard library, made once and kept under ``cache``.

    Args:
        cache: folder to keep the text in; :func:`reft_train.cache_folder.default_cache` when None.
        root: the library's folder; this interpreter's when None.

    Raises:
        UserError: the library's sources are not there (a zipped or stripped interpreter).
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    path = (
        default_cache() if cache is None else cache
    ) / f"stdlib-docstrings-{_fingerprint(root)}.json"
    examples = _cached(path)
    if examples is None:
        examples = extract(root)
        with contextlib.suppress(OSError):  # without a cache the next start takes a second more
            write_text(
                path,
                json.dumps([[e.text, e.label, e.source] for e in examples], ensure_ascii=False),
            )
    examples = _usable(examples)
    labels = sorted({example.label for example in examples})
    if len(labels) < 2:
        raise UserError(
            f"--data: got none, and the standard library in {root} has too few docstrings "
            f"({len(examples)}); "
            "expected its Python sources, or a file of your own"
        )
    train, held_out = split_by_module(examples)
    held = {example.source for example in held_out}
    modules = len({example.source for example in examples})
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    description = (
        f"Docstrings of {len(labels)} packages of Python {version}'s standard library, labelled "
        "with the package: "
        f"{len(train)} to train on and {len(held_out)} held out, from {len(held)} of {modules} "
        "modules. "
        f"No text occurs twice, and the packages' names in the texts are replaced by '{NEUTRAL}'."
    )
    return Dataset(train, held_out, labels, description)
