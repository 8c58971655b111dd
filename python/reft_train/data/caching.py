"""Tokenized data kept on disk by ``datasets``, under a name that says all they were made from."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_train.files import default_cache, replace_folder

if TYPE_CHECKING:
    import datasets

_FORMAT = 3  # of what is stored; part of every name


def cached(
    build: Callable[[], datasets.Dataset], parts: Mapping[str, object], folder: Path | None = None
) -> datasets.Dataset:
    """The data set that ``build`` makes, from disk where it was made before; memory-mapped either
    way.

    A stored one that cannot be read is made again; where nothing can be written a warning says so.

    Args:
        parts: whatever the data depend on, as JSON.
        folder: where data sets are kept; ``tokenized`` in the user's cache folder when None.
    """
    import datasets

    def load() -> datasets.Dataset | None:
        try:
            return datasets.load_from_disk(str(path))
        except Exception:  # what a broken file raises depends on where it is broken
            return None

    folder = default_cache() / "tokenized" if folder is None else folder
    named = json.dumps({"format": _FORMAT, **parts}, sort_keys=True)
    path = folder / hashlib.sha256(named.encode()).hexdigest()
    if (stored := load()) is not None:
        return stored
    dataset, temporary = build(), None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".new."))
        dataset.save_to_disk(str(temporary / "data"))
        if load() is None:  # no other process made the same meanwhile
            replace_folder(temporary / "data", path)
    except OSError as error:
        if load() is None:
            warnings.warn(f"tokenized data are not kept: {error}", stacklevel=2)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    stored = load()
    return dataset if stored is None else stored


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of what decides a tokenizer's output: vocabulary, rules, special tokens, template,
    sides.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        from datasets.fingerprint import Hasher

        rules: Any = Hasher.hash(tokenizer)
    else:  # less what the last call asked for, which is no part of the tokenizer
        rules = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    settings = {
        "class": type(tokenizer).__name__,
        "rules": rules,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": getattr(tokenizer, "chat_template", None),
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
        "added": [getattr(tokenizer, f"add_{end}_token", None) for end in ("bos", "eos")],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
