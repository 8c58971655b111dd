"""On-disk cache of tokenized data, keyed by a hash of everything the data depend on."""

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

_FORMAT = 3  # version of the stored format; part of every key


def cached(
    build: Callable[[], datasets.Dataset], parts: Mapping[str, object], folder: Path | None = None
) -> datasets.Dataset:
    """Return the data set that ``build`` creates, memory-mapped from disk, cached if possible.

    An unreadable cached data set is rebuilt. If the cache cannot be written, a warning is issued.

    Args:
        parts: everything the data depend on, as JSON-serializable values.
        folder: cache folder. None: ``tokenized`` in the user's cache folder.
    """
    import datasets

    def load() -> datasets.Dataset | None:
        try:
            return datasets.load_from_disk(str(path))
        except Exception:  # the error type depends on where the file is damaged
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
        if load() is None:  # another process may have created it in the meantime
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
    """Return a SHA-256 of all tokenizer state that affects its output.

    Covers vocabulary, rules, special tokens, chat template, and padding and truncation sides.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        from datasets.fingerprint import Hasher

        rules: Any = Hasher.hash(tokenizer)
    else:  # truncation and padding of the last call are not part of the tokenizer
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
