"""An object for each thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class PerThread(threading.local, Generic[T]):
    """Holds one object for each thread in its attribute ``here``.

    The state is in a plain object because torch.compile loses what traced code assigns to
    attributes of a ``threading.local`` when the graph breaks.

    Args:
        make: called without arguments in each thread that reads ``here``.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self.here = make()
