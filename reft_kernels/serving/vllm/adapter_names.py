"""The adapters that a server offers by name, and how a name is loaded, replaced and unloaded.

A name points to one version of an adapter. Loading a name again makes a new version, and requests
that run keep theirs: the engine knows each version by a key of its own, and drops a version once it
is neither named nor used by a request.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import re
import weakref
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from typing import Any, Protocol, TypeVar

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:-]{0,127}")
# vLLM applies an adapter of such a name to chat messages with content of that type, unasked
_CONTENT_TYPES = ("audio", "file", "image", "input", "refusal", "text", "thinking", "video")
T = TypeVar("T")


def check_name(name: object, reserved: Collection[str] = ()) -> str:
    """Return a name of an adapter.

    Args:
        name: 1 to 128 letters, digits and ``_ . : -``, not starting with ``. : -``.
        reserved: names of the base model and of LoRA adapters, which an adapter cannot have.

    Raises:
        ValueError: Another name, a reserved one, or a content type of chat messages.
    """
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ValueError(
            f"name: got {name!r}, expected 1 to 128 letters, digits and '_.:-', starting with a "
            "letter, digit or '_'"
        )
    if name in reserved:
        raise ValueError(
            f"name: got {name!r}, which the base model or a LoRA adapter has, expected another name"
        )
    if name in _CONTENT_TYPES:
        raise ValueError(
            f"name: got {name!r}, a content type of chat messages, expected another name"
        )
    return name


class Engine(Protocol):
    """What the names need from the engine. All calls raise ``ValueError`` for a bad adapter."""

    async def load(self, key: str, folder: str) -> dict[str, Any]:
        """Load a folder under a key and return what the engine says about it."""

    async def unload(self, key: str) -> None:
        """Drop the adapter of a key."""


@dataclasses.dataclass(eq=False)
class Version:
    """One loaded adapter.

    Attributes:
        name: the public name.
        key: the engine's name of this version.
        folder: where it was loaded from.
        info: what the engine says about it: its hash, rank, layers and positions.
        requests: number of requests that use it.
        named: whether the public name still points to it.
    """

    name: str
    key: str
    folder: str
    info: dict[str, Any]
    requests: int = 0
    named: bool = True


class AdapterNames:
    """The adapters of one server. All methods are called on the event loop's thread.

    Args:
        engine: loads and unloads.
        reserved: returns the names that adapters cannot have.
        changed: called with a name and its new version, or None when the name is gone.
    """

    def __init__(
        self,
        engine: Engine,
        reserved: Callable[[], Collection[str]],
        changed: Callable[[str, Version | None], None],
    ) -> None:
        self._engine, self._reserved, self._changed = engine, reserved, changed
        self._loop = asyncio.get_running_loop()
        self._named: dict[str, Version] = {}
        self._retired: set[Version] = set()
        self._numbers = itertools.count(1)
        self._changes = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Version]:
        return iter(list(self._named.values()))

    def __len__(self) -> int:
        return len(self._named)

    def get(self, name: str) -> Version | None:
        """Return the version that a name points to, or None."""
        return self._named.get(name)

    @property
    def retired(self) -> list[Version]:
        """Versions without a name that requests still use."""
        return sorted(self._retired, key=lambda version: version.key)

    def adopt(self, name: str, folder: str, info: dict[str, Any]) -> Version:
        """Name an adapter that the engine has loaded under this key by itself."""
        self._named[name] = version = Version(name, name, folder, info)
        self._changed(name, version)
        return version

    async def load(self, name: str, folder: str) -> Version:
        """Load a folder and point the name to it. A failed load leaves the name as it was.

        Raises:
            ValueError: The name cannot be used, or the engine refuses the adapter.
        """
        check_name(name, self._reserved())
        async with self._changes:
            key = f"{name}@{next(self._numbers)}"  # "@" is in no public name
            info = await self._engine.load(key, folder)
            before, version = self._named.get(name), Version(name, key, folder, info)
            self._named[name] = version
            self._changed(name, version)
            if before is not None:
                self._retire(before)
        return version

    async def unload(self, name: str) -> Version:
        """Take the name away. The engine keeps the adapter until its last request has ended.

        Raises:
            KeyError: No adapter has the name.
        """
        async with self._changes:
            version = self._named.pop(name)
            self._changed(name, None)
            self._retire(version)
        return version

    def holding(
        self, version: Version, stream: AsyncGenerator[T, None], check: Callable[[T], None]
    ) -> AsyncGenerator[T, None]:
        """Return a request's stream, which keeps the version loaded until it ends or is dropped.

        Args:
            version: the adapter of the request.
            stream: the outputs of the request.
            check: called with each output before it is passed on; may raise.
        """
        version.requests += 1
        releases: list[weakref.finalize[..., Any]] = []
        held = self._relay(version, stream, check, releases)
        # a stream that nobody starts runs no "finally"
        release = weakref.finalize(held, self._loop.call_soon_threadsafe, self._release, version)
        release.atexit = False
        releases.append(release)
        return held

    async def drained(self) -> None:
        """Wait until the engine has dropped what can be dropped."""
        while self._tasks:
            await asyncio.gather(*self._tasks)

    async def _relay(
        self,
        version: Version,
        stream: AsyncGenerator[T, None],
        check: Callable[[T], None],
        releases: list[Any],
    ) -> AsyncGenerator[T, None]:
        try:
            async for output in stream:
                check(output)
                yield output
        finally:
            await stream.aclose()  # tells the engine of an abort, before the version can go
            if releases[0].detach() is not None:
                self._release(version)

    def _release(self, version: Version) -> None:
        version.requests -= 1
        self._drop_unused(version)

    def _retire(self, version: Version) -> None:
        version.named = False
        self._retired.add(version)
        self._drop_unused(version)

    def _drop_unused(self, version: Version) -> None:
        if version.named or version.requests or version not in self._retired:
            return
        self._retired.remove(version)
        task = self._loop.create_task(self._engine.unload(version.key))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
