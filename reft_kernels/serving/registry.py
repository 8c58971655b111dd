"""Names of served adapters, on the side that accepts requests."""

from __future__ import annotations

from collections.abc import Sequence

from reft_kernels.serving.adapters import ServedAdapter
from reft_kernels.serving.errors import AdapterError, UnknownAdapter
from reft_kernels.serving.positions import edited_ranges, template_end
from reft_kernels.serving.requests import AdapterRequest
from reft_kernels.serving.steps import Edit


class Registry:
    """Adapters by name, with the number of unfinished requests of each.

    A name that is unloaded is refused at once. Its weights are still needed while a request that
    was accepted before is unfinished; :meth:`release` says when the last one is.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, ServedAdapter] = {}
        self._running: dict[str, int] = {}  # by content hash

    @property
    def names(self) -> list[str]:
        """The names, in the order of loading."""
        return list(self._by_name)

    def get(self, name: str) -> ServedAdapter:
        """Return the adapter of that name.

        Raises:
            UnknownAdapter: If there is none.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise UnknownAdapter(name, self.names) from None

    def check_new(self, name: str, adapter: ServedAdapter) -> None:
        """Raise AdapterError if the name belongs to an adapter with other content."""
        known = self._by_name.get(name)
        if known is not None and known.hash != adapter.hash:
            raise AdapterError(
                f"name: got {name!r} for {adapter.folder}, expected a new name, or unload it "
                f"first: it is the adapter of {known.folder}, whose content differs"
            )

    def add(self, name: str, adapter: ServedAdapter) -> None:
        """Add an adapter; a second time with the same content changes nothing.

        Raises:
            AdapterError: If the name is no string of at least one character, or belongs to an
                adapter with other content.
        """
        if not isinstance(name, str) or not name or name.lstrip().startswith("{"):
            raise AdapterError(
                f"name: got {name!r}, expected a string that is not empty and no JSON object"
            )
        self.check_new(name, adapter)
        self._by_name.setdefault(name, adapter)

    def remove(self, name: str) -> ServedAdapter:
        """Remove a name and return its adapter.

        Raises:
            UnknownAdapter: If there is none.
        """
        adapter = self.get(name)
        del self._by_name[name]
        return adapter

    def is_used(self, content: str) -> bool:
        """Return whether a name or an unfinished request needs the weights."""
        return content in self._running or any(a.hash == content for a in self._by_name.values())

    def acquire(self, content: str) -> None:
        """Count one more unfinished request."""
        self._running[content] = self._running.get(content, 0) + 1

    def release(self, content: str) -> bool:
        """Count one less unfinished request; return whether nothing needs the weights any more."""
        self._running[content] -= 1
        if not self._running[content]:
            del self._running[content]
        return not self.is_used(content)

    def resolve(
        self, request: AdapterRequest, num_tokens: int, tokens: Sequence[int] | None
    ) -> Edit | None:
        """Return the edit that a request asks for, or None if it edits nothing.

        Args:
            request: The parsed request.
            num_tokens: Number of tokens of the prompt.
            tokens: The token ids of the prompt, or None if it has none (embeddings).

        Raises:
            UnknownAdapter: If there is no adapter of that name.
            AdapterError: If the request does not fit its adapter or its prompt.
        """
        adapter = self.get(request.adapter)
        if request.subspaces is not None and request.subspaces[-1] >= adapter.rank:
            raise AdapterError(
                f"subspaces: got {list(request.subspaces)}, expected numbers below {adapter.rank}, "
                f"the rank of {request.adapter!r}"
            )
        length = num_tokens
        if request.prompt_length is not None:
            if request.prompt_length > num_tokens:
                raise AdapterError(
                    f"prompt_length: got {request.prompt_length}, expected at most {num_tokens}, "
                    "the tokens of the prompt"
                )
            length = request.prompt_length
        elif adapter.template is not None and adapter.spec.kind != "all":
            if tokens is None:
                raise AdapterError(
                    f"adapter: {request.adapter!r} finds the end of the prompt by its response "
                    "template, expected a prompt of token ids, or prompt_length"
                )
            length = template_end(tokens, adapter.template) or num_tokens
        ranges = edited_ranges(adapter.spec, adapter.untied, length)
        if not ranges or request.coefficient == 0.0:
            return None
        return Edit(adapter.hash, ranges, request.coefficient, request.subspaces)
