"""The scheduler's side: which requests edit what, their cache salts, and when slots are free.

The scheduler is the authority. It resolves the adapter of a request when the request arrives, sets
its cache salt, and sends the edit to the workers with the request's first step. It holds requests
back while the slots of the bank are taken by other prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core import EngineCore

from reft_kernels.serving.adapters import ServedAdapter, load_adapter
from reft_kernels.serving.bank import SlotKey
from reft_kernels.serving.errors import AdapterError
from reft_kernels.serving.registry import Registry
from reft_kernels.serving.requests import parse_request
from reft_kernels.serving.salt import cache_salt, unedited_salt
from reft_kernels.serving.steps import Edit
from reft_kernels.serving.vllm import messages, plugin, settings
from reft_kernels.serving.vllm.plugin import adapter_value

LOAD, UNLOAD = "reft_load_adapter", "reft_unload_adapter"


class ReftScheduler(Scheduler):
    """vLLM's scheduler with ReFT adapters; the asynchronous one where that is enabled."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> ReftScheduler:
        if cls is ReftScheduler and vllm_config.scheduler_config.async_scheduling:
            return super().__new__(ReftAsyncScheduler)
        return super().__new__(cls)

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.reft_settings = settings.of(vllm_config)
        self.reft_registry = Registry()
        for name, source in self.reft_settings.adapters.items():
            adapter = load_adapter(*source)
            self._check(adapter)
            self.reft_registry.add(name, adapter)
        setattr(vllm_config, plugin.REGISTRY, self.reft_registry)
        self._edits: dict[str, Edit] = {}  # of unfinished requests
        self._dropped: list[str] = []
        self._refused: list[tuple[Any, str]] = []
        self._taken: set[SlotKey] = set()  # slots that prompts of the current step need
        self._holding = False

    # ---- requests

    def add_request(self, request: Any) -> None:
        """Queue a request; one whose adapter is refused finishes with an error in the next step."""
        value = adapter_value(request.sampling_params)
        if request.request_id in self.requests:  # more of a streamed prompt, which has no adapter
            return super().add_request(request)
        try:
            edit = None if value is None else self._resolve(request, value)
        except AdapterError as error:
            self._refused.append((request, f"reft: {error}"))
            return None
        if edit is None:
            salt = unedited_salt(request.cache_salt)
        else:
            salt = cache_salt(*edit, client=request.cache_salt)
            self._edits[request.request_id] = edit
            self.reft_registry.acquire(edit.content)
        if salt != request.cache_salt:
            request.cache_salt = salt
            request.block_hashes.clear()
            request.update_block_hashes()
        return super().add_request(request)

    def _resolve(self, request: Any, value: Any) -> Edit | None:
        if request.resumable:
            raise AdapterError("a prompt that is streamed cannot have an adapter")
        tokens = None if request.prompt_is_token_ids is not None else request.prompt_token_ids
        return self.reft_registry.resolve(parse_request(value), request.num_prompt_tokens, tokens)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        edit = self._edits.pop(request.request_id, None)
        if edit is not None and self.reft_registry.release(edit.content):
            self._dropped.append(edit.content)
        return super()._free_request(request, *args, **kwargs)

    def has_requests(self) -> bool:
        """Return whether there is anything to do, refused requests included."""
        return bool(self._refused) or super().has_requests()

    # ---- steps

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, and tell the workers the edits of its new requests."""
        self._holding = False
        self._taken = {
            key
            for request in self.running
            if (edit := self._edits.get(request.request_id)) is not None
            and request.num_computed_tokens < edit.end
            for key in edit.slot_keys()
        }
        output = super().schedule(*args, **kwargs)
        new = {
            data.req_id: edit
            for data in output.scheduled_new_reqs
            if (edit := self._edits.get(data.req_id)) is not None
        }
        if new or self._dropped:
            messages.attach(output, messages.News(new, tuple(self._dropped)))
            self._dropped = []
        return output

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        """Return whether a waiting request can be scheduled in this step.

        Requests with adapters are admitted in their order: once one finds no slot, those behind it
        wait too, so that a steady stream of a few adapters starves no other.
        """
        if not super()._handle_blocked_waiting_request(request):
            return False
        edit = self._edits.get(request.request_id)
        if edit is None:
            return True
        taken = self._taken.union(edit.slot_keys())
        if self._holding or len(taken) > self.reft_settings.slots:
            self._holding = True
            return False
        self._taken = taken
        return True

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        """Return the outputs of a step, and the errors of refused requests."""
        outputs = super().update_from_output(*args, **kwargs)
        refused, self._refused = self._refused, []
        for request, reason in refused:
            entry = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=FinishReason.ERROR,
                stop_reason=reason,
            )
            outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[])).outputs.append(
                entry
            )
        return outputs

    # ---- control

    def reft_control(
        self, call: Callable[[str, tuple], list], method: str, args: tuple, kwargs: dict
    ) -> list:
        """Load or unload an adapter here and in all workers.

        Args:
            call: Calls a method of all workers.
            method: :data:`LOAD` or :data:`UNLOAD`.
            args: Its positional arguments, as of the worker's method.
            kwargs: Its keyword arguments.

        Returns:
            The result of each worker.
        """
        if method == LOAD:
            return self._load(call, *args, **kwargs)
        return self._unload(call, *args, **kwargs)

    def _load(self, call: Callable, name: str, folder: str, positions: str | None = None) -> list:
        adapter = load_adapter(folder, positions)
        self._check(adapter)
        new = name not in self.reft_registry.names
        self.reft_registry.add(name, adapter)
        try:
            results = call(LOAD, (name, folder, positions))
            if any(result["hash"] != adapter.hash for result in results):
                raise AdapterError(f"{folder}: the files changed while they were read")
            return results
        except Exception:
            if new:  # some workers may have it
                self.reft_registry.remove(name)
                call(UNLOAD, (name, self.reft_registry.is_used(adapter.hash), True))
            raise

    def _check(self, adapter: ServedAdapter) -> None:
        if adapter.num_sets > self.reft_settings.slots:
            raise AdapterError(
                f"{adapter.folder}: got an adapter with {adapter.num_sets} weight sets, expected "
                f"at most slots={self.reft_settings.slots}"
            )

    def _unload(self, call: Callable, name: str) -> list:
        adapter = self.reft_registry.remove(name)
        return call(UNLOAD, (name, self.reft_registry.is_used(adapter.hash)))


class ReftAsyncScheduler(ReftScheduler, AsyncScheduler):
    """The asynchronous scheduler with ReFT adapters."""


def _watch_control() -> None:
    """Make ``EngineCore.collective_rpc`` route :data:`LOAD` and :data:`UNLOAD` to the scheduler."""
    original = EngineCore.collective_rpc
    if hasattr(original, "reft_original"):
        return

    @functools.wraps(original)
    def collective_rpc(
        self: Any, method: Any, timeout: float | None = None, args: tuple = (), kwargs: Any = None
    ) -> list:
        control = getattr(self.scheduler, "reft_control", None)
        if control is None or method not in (LOAD, UNLOAD):
            return original(self, method, timeout, args, kwargs)
        return control(
            lambda name, values: original(self, name, timeout, values),
            method,
            tuple(args),
            dict(kwargs or {}),
        )

    wrapper: Any = collective_rpc
    wrapper.reft_original = original
    EngineCore.collective_rpc = wrapper


plugin.register()
_watch_control()
