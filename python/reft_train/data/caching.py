"""On-disk cache of tokenized data, keyed by a hash of everything the data depend on."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_train.errors import UserError
from reft_train.files import default_cache

if TYPE_CHECKING:
    import datasets

_FORMAT = 4  # version of the stored format; part of every key


def cached(
    items: Callable[[], Iterable[dict[str, Any]]],
    features: datasets.Features,
    parts: Mapping[str, object],
    folder: Path | None = None,
) -> datasets.Dataset:
    """Return the data set of ``items()``, memory-mapped from the cache of ``datasets``.

    An unreadable cached data set is rebuilt. If the cache cannot be written, a warning is issued.

    Args:
        parts: everything the data depend on, as JSON-serializable values.
        folder: cache folder. None: ``tokenized`` in the user's cache folder.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    folder = default_cache() / "tokenized" if folder is None else folder
    named = json.dumps({"format": _FORMAT, **parts}, sort_keys=True)
    key = hashlib.sha256(named.encode()).hexdigest()
    for _ in range(2):
        options = {"features": features, "cache_dir": str(folder / key), "fingerprint": key}
        try:
            return datasets.Dataset.from_generator(items, **options)
        except (DatasetGenerationError, OSError, ValueError, KeyError) as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, UserError):
                raise cause from None
            if isinstance(cause, OSError) and not (folder / key).is_dir():
                break
            shutil.rmtree(folder / key, ignore_errors=True)  # damaged
    warnings.warn(f"tokenized data are not cached: {cause}", stacklevel=2)
    return datasets.Dataset.from_list(list(items()), features=features)


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
