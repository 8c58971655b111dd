"""A server of a tiny model with adapters, its clients, and the answers that it should give."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.vllm.http_models import Reference, save_adapter, save_model
from tests.serving.vllm.http_server import API_KEY, HttpServer, serving

POSITIONS = {"a": "f2+l2", "b": "f3", "c": "l1", "d": "prompt"}
SLOTS, MAX_RANK = 3, 8
Prompt = str | list[str] | list[int] | list[list[int]]


class Site:
    """A running server and what it should answer.

    Attributes:
        root: the adapter root.
        base: the base model's name.
    """

    base, slots = "base", SLOTS

    def __init__(self, server: HttpServer, model: Path, root: Path) -> None:
        self.server, self.model, self.root = server, model, root
        self.reference = Reference(model)
        self.client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0)

    def async_client(self) -> openai.AsyncOpenAI:
        """Return a new asynchronous client."""
        url = f"{self.server.url}/v1"
        return openai.AsyncOpenAI(base_url=url, api_key=API_KEY, max_retries=0, timeout=300)

    def tokens(self, prompt: str, name: str | None, count: int) -> tuple[int, ...]:
        """Return the greedy tokens of transformers with PEFT."""
        return self.reference.tokens(prompt, None if name is None else self.root / name, count)

    def complete(
        self, prompt: Prompt, name: str | None = None, count: int = 12, **options: Any
    ) -> list[tuple[int, ...]]:
        """Return the tokens of each answer of one request, greedy unless ``options`` say more."""
        answer = self.client.completions.create(**self._body(prompt, name, count, options))
        return [tuple(choice.token_ids) for choice in answer.choices]

    def stream(self, prompt: str, name: str | None, count: int, **options: Any) -> Any:
        """Return the events of one streamed request."""
        return self.client.completions.create(
            **self._body(prompt, name, count, options), stream=True
        )

    async def complete_async(
        self, client: openai.AsyncOpenAI, prompt: str, name: str | None, count: int
    ) -> tuple[int, ...]:
        """Return the tokens of one request."""
        answer = await client.completions.create(**self._body(prompt, name, count, {}))
        return tuple(answer.choices[0].token_ids)

    def _body(
        self, prompt: Prompt, name: str | None, count: int, options: dict[str, Any]
    ) -> dict[str, Any]:
        fields = {"model": name or self.base, "prompt": prompt, "max_tokens": count}
        return fields | {"extra_body": {"return_token_ids": True, "temperature": 0} | options}

    def post(self, route: str, /, **body: Any) -> dict[str, Any]:
        """Post JSON to a route under /v1. Raises openai.APIStatusError as for other routes."""
        return self.client.post(route, body=body, cast_to=object)

    def adapters(self) -> list[dict[str, Any]]:
        """Return ``GET /v1/reft/adapters``."""
        return json.loads(self.server.get("/v1/reft/adapters"))["data"]

    def requests_of(self, name: str) -> int:
        """Return the number of requests in flight of the adapter that has a name."""
        return sum(one["requests"] for one in self.adapters() if one["name"] == name)

    def metrics(self) -> dict[str, float]:
        """Return the values of all metrics without labels, and the last ones of those with."""
        families = text_string_to_metric_families(self.server.get("/metrics"))
        return {sample.name: sample.value for family in families for sample in family.samples}

    def wait_until(self, holds: Callable[[], bool], seconds: float = 30) -> None:
        """Wait until a condition holds."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "the condition does not hold"
            time.sleep(0.05)

    def still_serves(self) -> None:
        """Check that the engine answers, with and without an adapter."""
        for name in (None, "a"):
            assert self.complete("the answer", name, 4) == [self.tokens("the answer", name, 4)]


@contextlib.contextmanager
def running_site(folder: Path) -> Iterator[Site]:
    """Start a server with the adapters of ``POSITIONS``."""
    model, root = save_model(folder / "model"), folder / "root"
    adapter = functools.partial(save_adapter, model)
    for seed, (name, positions) in enumerate(POSITIONS.items()):
        adapter(root / name, seed, positions=positions)
    flags = ["--model", str(model), "--served-model-name", Site.base, "--slots", str(SLOTS)]
    flags += ["--max-rank", str(MAX_RANK), "--adapter-root", str(root)]
    for name in POSITIONS:
        flags += ["--adapter", f"{name}={root / name}"]
    with serving(flags, folder) as server:
        yield Site(server, model, root)
