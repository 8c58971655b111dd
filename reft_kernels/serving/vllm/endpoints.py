"""The plugin of vLLM's HTTP server: adapters by name, loaded and unloaded while it runs.

vLLM makes it from the entry point ``reft_kernels_http`` of the group ``vllm.endpoint_plugins``, if
``VLLM_PLUGINS`` names it. ``reft-serve`` sets that, and passes its own flags in ``SETTINGS``.

Source of the interface: ``vllm/plugins/endpoint_plugins/interface.py`` of vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import json
import os
from argparse import Namespace
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError, VLLMValidationError
from vllm.logger import init_logger

from reft_kernels.serving.adapters import check_fits, load_adapter
from reft_kernels.serving.vllm import metrics
from reft_kernels.serving.vllm import settings as engine_settings
from reft_kernels.serving.vllm.adapter_names import AdapterNames, Version, check_name
from reft_kernels.serving.vllm.adapter_root import folder_in
from reft_kernels.serving.vllm.admission import Admission, OfferedAdapter
from reft_kernels.serving.vllm.server_settings import SETTINGS, ServerSettings
from reft_kernels.serving.vllm.state import model_of

logger = init_logger("vllm.reft_kernels")
router = APIRouter()


class LoadAdapter(BaseModel):
    """Body of ``POST /v1/reft/load``: ``path`` is a folder of the adapter root (``name``)."""

    model_config = ConfigDict(extra="forbid")
    name: str
    path: str | None = None


class UnloadAdapter(BaseModel):
    """Body of ``POST /v1/reft/unload``."""

    model_config = ConfigDict(extra="forbid")
    name: str


class EngineCalls:
    """The engine's part of loading, over ``collective_rpc``; every rank holds every adapter."""

    def __init__(self, engine_client: EngineClient) -> None:
        self._client = engine_client
        self._model = model_of(engine_client.model_config)
        self._max_rank = engine_settings.of(engine_client.vllm_config).max_rank

    async def load(self, key: str, folder: str) -> dict[str, Any]:
        """Load a folder on every rank, and return what the first says about it.

        Raises:
            ValueError: The adapter cannot be served, or does not fit the model.
        """
        # here first: an error of a worker arrives without its type
        adapter = await asyncio.to_thread(load_adapter, folder)
        check_fits(adapter, self._model, self._max_rank)
        try:
            results = await self._client.collective_rpc("reft_load_adapter", args=(key, folder))
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise ValueError(str(error).partition("method failed: ")[2] or str(error)) from None
        return results[0]

    async def unload(self, key: str) -> None:
        """Drop an adapter on every rank."""
        await self._client.collective_rpc("reft_unload_adapter", args=(key,))

    async def adapters(self) -> list[dict[str, Any]]:
        """Return what the first rank says about each adapter."""
        return (await self._client.collective_rpc("reft_list_adapters"))[0]

    async def stats(self) -> dict[str, Any]:
        """Return the counters of the first rank's bank."""
        return (await self._client.collective_rpc("reft_stats"))[0]


class Server:
    """What the plugin keeps in the application's state."""

    def __init__(self, engine_client: EngineClient, state: State, settings: ServerSettings) -> None:
        self._models = state.openai_serving_models
        self.settings = settings
        self.calls = EngineCalls(engine_client)
        self.names = AdapterNames(self.calls, self._reserved, self._offer)
        self.admission = Admission(self.names, engine_client)
        for handler in state._state.values():
            if isinstance(handler, BaseServing):
                self.admission.watch(handler)

    async def start(self) -> None:
        """Offer the adapters that the engine has, and load those of the command line."""
        for info in await self.calls.adapters():
            name = check_name(info["name"], self._reserved())
            self.names.adopt(name, info.get("folder") or name, info)
        for name, folder in self.settings.adapters.items():
            await self.names.load(name, folder)
        logger.info(
            "ReFT adapters: %s", ", ".join(version.name for version in self.names) or "none"
        )

    async def listed(self) -> list[dict[str, Any]]:
        """Return each adapter with the engine's state of it and its requests in flight."""
        engine = {info["name"]: info for info in await self.calls.adapters()}
        return [
            {**version.info, **engine.get(version.key, {})}
            | {"name": version.name, "named": version.named, "requests": version.requests}
            for version in [*self.names, *self.names.retired]
        ]

    def _reserved(self) -> set[str]:
        models = self._models
        lora = {n for n, r in models.lora_requests.items() if not isinstance(r, OfferedAdapter)}
        return lora | {path.name for path in models.base_model_paths}

    def _offer(self, name: str, version: Version | None) -> None:
        if version is None:
            if isinstance(self._models.lora_requests.get(name), OfferedAdapter):
                del self._models.lora_requests[name]
            return
        number = self._models.lora_id_counter.inc(1)
        self._models.lora_requests[name] = OfferedAdapter(name, number, version.folder)


def _server(request: Request) -> Server:
    return request.app.state.reft


def _root(server: Server) -> Path:
    root = server.settings.adapter_root
    if root is None:
        raise GracefulHTTPError(
            "adapters cannot be changed over HTTP: the server was started without --adapter-root",
            HTTPStatus.FORBIDDEN,
        )
    return Path(root)


@router.get("/v1/reft/adapters")
async def list_all(raw_request: Request) -> dict[str, Any]:
    """List adapters: hash, rank, layers, positions, place and requests in flight."""
    return {"object": "list", "data": await _server(raw_request).listed()}


@router.post("/v1/reft/load")
async def load(body: LoadAdapter, raw_request: Request) -> dict[str, Any]:
    """Load an adapter of the adapter root, or replace the one of that name."""
    server = _server(raw_request)
    root = _root(server)
    path = body.name if body.path is None else body.path
    try:
        folder = await asyncio.to_thread(folder_in, root, path)
    except FileNotFoundError as error:
        raise VLLMNotFoundError(str(error)) from None
    except ValueError as error:
        raise VLLMValidationError(str(error)) from None
    try:
        version = await server.names.load(body.name, str(folder))
    except ValueError as error:
        raise VLLMValidationError(str(error)) from None
    return {**version.info, "name": version.name}


@router.post("/v1/reft/unload")
async def unload(body: UnloadAdapter, raw_request: Request) -> dict[str, Any]:
    """Unload an adapter. Requests in flight keep it until they end."""
    server = _server(raw_request)
    _root(server)
    try:
        version = await server.names.unload(body.name)
    except KeyError:
        raise VLLMNotFoundError(f"name: got {body.name!r}, no adapter has it") from None
    return {"name": version.name, "requests": version.requests}


class ReftEndpoints:
    """The plugin that vLLM makes."""

    name = "reft_kernels_http"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes under ``/v1/reft``, which ``--api-key`` guards as it does all of /v1."""
        app.include_router(router)
        app.add_middleware(metrics.FreshMetrics, state=app.state)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Put the adapters into the application's state."""
        if engine_client is None:
            return
        settings = ServerSettings(**json.loads(os.environ.get(SETTINGS, "{}")))
        state.reft = server = Server(engine_client, state, settings)
        await server.start()
        state.reft_metrics = metrics.register(
            metrics.AdapterMetrics(server.names, server.admission, server.calls.stats)
        )
