"""Tokenized data kept on disk, under a name that says everything it was made from."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_train.cache_folder import default_cache
from reft_train.files import replace_folder, write_text

if TYPE_CHECKING:
    import datasets

_FORMAT = 2  # of what is stored; part of every name
_MANIFEST = "reft_train.json"  # written last: the digest of every other file


def cached(
    build: Callable[[], datasets.Dataset], parts: Mapping[str, object], folder: Path | None = None
) -> datasets.Dataset:
    """The data set that ``build`` makes, from disk where it was made before; memory-mapped either
    way.

    Args:
        parts: whatever the data depend on, as JSON: :func:`file_digest`, :func:`tokenizer_digest`,
            the task's name, limits.
        folder: where data sets are kept, each in a folder of its own; ``tokenized`` under
            :func:`default_cache` when None.

    A stored one that is damaged or half written is made again. Where nothing can be written a
    warning says so.
    """
    folder = default_cache() / "tokenized" if folder is None else folder
    named = json.dumps({"format": _FORMAT, **parts}, sort_keys=True)
    path = folder / hashlib.sha256(named.encode()).hexdigest()
    stored = _load(path)
    if stored is not None:
        return stored
    dataset = build()
    try:
        _store(dataset, path)
    except OSError as error:
        warnings.warn(f"tokenized data are not kept: {error}", stacklevel=2)
        return dataset
    stored = _load(path)
    return dataset if stored is None else stored


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of what decides a tokenizer's output: class, vocabulary and rules, special tokens,
    chat template, sides.
    """
    settings = {
        "class": type(tokenizer).__name__,
        "rules": _rules(tokenizer),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": getattr(tokenizer, "chat_template", None),
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
        "added": [getattr(tokenizer, f"add_{end}_token", None) for end in ("bos", "eos")],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _rules(tokenizer: Any) -> object:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # what the last call asked for, not part of the tokenizer
        return {
            name: value for name, value in rules.items() if name not in ("truncation", "padding")
        }
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(name) for name in tokenizer.save_vocabulary(folder)]
        vocabulary = {file.name: file_digest(file) for file in files}
    return [
        vocabulary,
        {token: int(number) for token, number in tokenizer.get_added_vocab().items()},
    ]


def _store(dataset: datasets.Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:16]}."))
    try:
        whole = temporary / "data"
        dataset.save_to_disk(str(whole))
        write_text(
            whole / _MANIFEST,
            json.dumps({file.name: file_digest(file) for file in sorted(whole.iterdir())}),
        )
        if _load(path) is not None:
            return  # another process made the same meanwhile
        try:
            replace_folder(whole, path)
        except OSError:
            if _load(path) is None:  # or another process came first by a moment
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(path: Path) -> datasets.Dataset | None:
    """The data set stored at ``path``; None where there is none, or where a file is not what was
    written.
    """
    import datasets

    try:
        expected = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        # by name: a later map() puts files of its own beside these
        if expected != {name: file_digest(path / name) for name in expected}:
            return None
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, TypeError):
        return None
