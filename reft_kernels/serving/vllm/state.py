"""The adapters and edits of one worker, independent of the model runner."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from reft_kernels.serving.adapters import (
    ServedAdapter,
    ServedModel,
    check_fits,
    load_adapter,
    served_model,
)
from reft_kernels.serving.bank import Bank
from reft_kernels.serving.errors import UnknownAdapter
from reft_kernels.serving.registry import Registry
from reft_kernels.serving.steps import Edit, Scheduled, Step, build_step
from reft_kernels.serving.vllm.messages import News
from reft_kernels.serving.vllm.settings import Settings

_logger = logging.getLogger("vllm.reft_kernels")  # vLLM shows its own loggers only


def model_of(config: Any) -> ServedModel:
    """Return what adapters must fit, from vLLM's configuration of the model.

    Raises:
        AdapterError: If a file of the model is damaged.
    """
    text = config.hf_text_config
    return served_model(text, config.model, config.revision, config.get_hidden_size())


class WorkerState:
    """Adapters by content hash and name, the bank, and the edits of requests.

    Args:
        settings: The plugin's settings.
        model: What adapters must fit.
        bank: The weights on the device, of the layers that this worker holds.
    """

    def __init__(self, settings: Settings, model: ServedModel, bank: Bank) -> None:
        self.model, self.bank = model, bank
        self.adapters: dict[str, ServedAdapter] = {}  # by content hash
        self._names = Registry()
        self._edits: dict[str, Edit] = {}  # by request id
        for name, source in settings.adapters.items():
            self.load(name, *source)

    def load(self, name: str, folder: str, positions: str | None = None) -> dict[str, Any]:
        """Read an adapter and keep it on the host; see ``ReftWorker.reft_load_adapter``."""
        adapter = load_adapter(folder, positions)
        check_fits(adapter, self.model, self.bank.max_rank)
        if adapter.fingerprint is None:
            _logger.info(
                "%s does not say which base model it was trained on: only its sizes are checked",
                folder,
            )
        self._names.add(name, adapter)
        self.adapters.setdefault(adapter.hash, adapter)
        return self._describe(name)

    def unload(self, name: str, keep: bool, missing_ok: bool) -> None:
        """Forget a name, and the adapter unless ``keep`` is true."""
        try:
            adapter = self._names.remove(name)
        except UnknownAdapter:
            if not missing_ok:
                raise
            return
        if not keep:
            self._drop(adapter.hash)

    def list(self) -> list[dict[str, Any]]:
        """Return a description of each adapter that has a name."""
        return [self._describe(name) for name in self._names.names]

    def _describe(self, name: str) -> dict[str, Any]:
        adapter = self._names.get(name)
        return {"name": name, **adapter.describe(), "resident": adapter.hash in self.bank.resident}

    def _drop(self, content: str) -> None:
        self.adapters.pop(content, None)
        self.bank.forget(content)

    def update(self, news: News | None, finished: Iterable[str]) -> None:
        """Take over the changes that the scheduler sends with a step."""
        for request in finished:
            self._edits.pop(request, None)
        if news is not None:
            self._edits.update(news.edits)
            for content in news.dropped:
                self._drop(content)

    def step(
        self, requests: Iterable[str], rows: Any, columns: Any, num_requests: int
    ) -> Step | None:
        """Compute the edits of a step.

        Args:
            requests: Request ids, in the order of the batch.
            rows: Integers ``[num_requests + 1]``, the row of each request's first token.
            columns: Integers ``[num_requests]``, the column of that token in its sequence.
            num_requests: Number of requests of the batch.

        Returns:
            None if no row is edited.
        """
        if not self._edits:
            return None
        scheduled = []
        for index, request in zip(range(num_requests), requests, strict=False):
            edit = self._edits.get(request)
            if edit is not None and columns[index] < edit.end:
                row = int(rows[index])
                scheduled.append(
                    Scheduled(edit, row, int(columns[index]), int(rows[index + 1]) - row)
                )
        return build_step(scheduled, self.adapters, self.bank) if scheduled else None
