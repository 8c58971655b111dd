"""Identity of the cached states that a request's edits produce.

A prefix cache finds blocks by their tokens. The states of a prompt with edits depend also on what
was edited, and how, so the identity holds the weights' content hash, the edited columns, the
coefficient and the subspaces. The columns carry the prompt's length where it matters: positions
counted from the prompt's end, and "prompt", whose reply is not edited. For positions counted from
the start alone ("f4") and for "all" they are the same for every long enough prompt, so that
prompts of different lengths share their common blocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from reft_kernels.serving.positions import EditedRange

PREFIX = "reft-"


def cache_salt(
    content: str,
    ranges: Sequence[EditedRange],
    coefficient: float,
    subspaces: Sequence[int] | None,
    client: str | None,
) -> str:
    """Return the salt of a request with edits.

    Args:
        content: Content hash of the adapter.
        ranges: The edited columns.
        coefficient: See :class:`reft_kernels.serving.requests.AdapterRequest`.
        subspaces: See :class:`reft_kernels.serving.requests.AdapterRequest`.
        client: The salt that the client sent, or None.
    """
    identity = [
        content,
        [list(r) for r in ranges],
        float(coefficient).hex(),
        None if subspaces is None else list(subspaces),
        client,
    ]
    return PREFIX + hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def unedited_salt(client: str | None) -> str | None:
    """Return the salt of a request without edits: the client's.

    A client's salt that starts like those of this module is replaced by its hash, so that no client
    can name the cached states of an adapter.
    """
    if client is None or not client.startswith(PREFIX):
        return client
    return PREFIX + "client-" + hashlib.sha256(client.encode()).hexdigest()
