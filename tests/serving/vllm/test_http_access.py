"""Who may load: nobody without the server's key, and no client without ``--adapter-root``."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

ROUTES = {
    "list": ("GET", "/v1/reft/adapters", None),
    "load": ("POST", "/v1/reft/load", {"name": "a"}),
    "unload": ("POST", "/v1/reft/unload", {"name": "a"}),
}


@pytest.mark.parametrize("key", [None, "other"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_client_without_the_key(site, route, key):
    import httpx

    method, path, body = ROUTES[route]
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    before = site.adapters()
    answer = httpx.request(method, site.server.url + path, json=body, headers=headers)
    assert answer.status_code == 401 and answer.json() == {"error": "Unauthorized"}
    assert site.adapters() == before


@pytest.fixture
def app(monkeypatch):
    """vLLM's application with our routes, as started without ``--adapter-root``, and no engine."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from reft_kernels.serving.vllm.serve import plugins
    from reft_kernels.serving.vllm.server_settings import ServerSettings

    async def listed():
        return []

    def never(*_):
        raise AssertionError("an adapter was changed")

    monkeypatch.setenv("VLLM_PLUGINS", plugins({}))
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--api-key", "key"])
    made = build_app(args, ("generate",))
    made.state.reft = SimpleNamespace(
        settings=ServerSettings(), names=SimpleNamespace(load=never, unload=never), listed=listed
    )
    return made


@pytest.mark.parametrize(("route", "status"), [("list", 200), ("load", 403), ("unload", 403)])
def test_a_server_without_an_adapter_root(app, route, status):
    import httpx

    async def answered(key):
        transport = httpx.ASGITransport(app)
        headers = {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", headers=headers
        ) as client:
            method, path, body = ROUTES[route]
            return await client.request(method, path, json=body)

    assert asyncio.run(answered("other")).status_code == 401
    answer = asyncio.run(answered("key"))
    assert answer.status_code == status
    if status == 403:
        reason = "the server was started without --adapter-root"
        assert reason in answer.json()["error"]["message"]
